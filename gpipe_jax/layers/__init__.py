"""Describe layers, and provide the building blocks that all network families share."""
