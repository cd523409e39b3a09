"""Plan a run with the real TPU compiler, before renting a pod."""
