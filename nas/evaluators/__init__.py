"""Define jobs, outcomes and evaluators, and provide the evaluators that do not train."""
