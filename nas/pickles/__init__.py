"""Pickle spaces and evaluators: for the store, read with trust only, and for other processes."""
