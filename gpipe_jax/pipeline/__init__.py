"""Divide a network into stages, and run exact pipelined training steps."""
