"""Describe cells and networks of the AmoebaNet search space as data; imports no JAX."""
