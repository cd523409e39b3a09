"""Train every architecture of a cell space by one program, in which the architecture is data."""
