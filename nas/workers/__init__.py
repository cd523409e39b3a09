"""Run jobs on threads, devices, dask workers or executors, and keep them busy."""
