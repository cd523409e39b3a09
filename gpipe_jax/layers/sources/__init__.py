"""Describe layers by what they come from: nnx modules, Linen modules or functions."""
