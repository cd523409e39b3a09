"""Define what is searched: architectures, mutation, canonical form, text and picture; no JAX."""
