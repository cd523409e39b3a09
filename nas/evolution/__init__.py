"""Decide what is proposed and which member leaves: pure functions, no clock and no I/O."""
