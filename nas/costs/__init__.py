"""Measure the size and the speed of a network before it is trained."""
