"""Predict whether a layout fits a TPU slice and how fast it is, and find the best layout."""
