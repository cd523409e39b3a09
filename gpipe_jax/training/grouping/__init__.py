"""Apply optimizers that treat parameters differently, as by a mask, to the packed parameters."""
