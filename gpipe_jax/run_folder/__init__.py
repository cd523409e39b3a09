"""Take the folder of a run: tell it from a folder of the user's, and keep other runs out."""
