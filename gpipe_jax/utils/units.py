"""Units of what is counted in bytes."""

GIB = 2**30
