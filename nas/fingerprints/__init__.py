"""Fingerprint the code of evaluators and spaces, so that a change of it is noticed."""
