"""Lay devices and processes out as a mesh, move arrays between them and hosts, and end together."""
