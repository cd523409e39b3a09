"""Compile programs for TPU slices that are not here, and read what the compiler says."""
