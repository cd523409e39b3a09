"""Provide text, console, file, tree and drawing helpers."""
