"""Help all rooms: text, console, files, trees, pictures; knows no pipelines."""
