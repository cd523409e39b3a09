"""Do many steps of a trainer: steps in flight, callbacks, evaluations, divergence."""
