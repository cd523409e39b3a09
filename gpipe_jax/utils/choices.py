"""List the names that both the configuration and the pipeline accept; imports no JAX."""

REMAT = ("stage", "layer")  # the policies in `pipeline.remat`, from the least recomputation up
KEYS_PER = ("micro_batch", "example")  # what has random keys of its own
