"""Check batches of a pipeline, and divide them into micro-batches."""
