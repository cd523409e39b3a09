"""Run a training from a config: assemble, train, evaluate, log, resume."""
