"""Hold the folder of a run: refuse a folder of other files, and keep other runs out."""
