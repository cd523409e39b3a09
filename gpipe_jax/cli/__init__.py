"""Provide the command line `gpipe`: parsing, printing and exit codes."""
