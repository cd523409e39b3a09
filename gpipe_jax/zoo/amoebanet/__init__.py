"""Build AmoebaNets, and other networks of cells from the NASNet space."""
