"""List the names that configurations share with the code that they configure; imports no JAX."""

REMAT = ("stage", "layer")  # the policies in `pipeline.remat`, from the least recomputation up
KEYS_PER = ("micro_batch", "example")  # the unit that gets its own random keys
FOLDER_VARIABLE = "GPIPE_JAX_DATA"  # environment variable with the folder of data sets
