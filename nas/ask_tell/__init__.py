"""Run the search as an open loop: ask, tell, cache, limits, retries, resume and replay."""
