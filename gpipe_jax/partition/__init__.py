"""Estimate what layers cost, and cut networks into balanced stages."""
