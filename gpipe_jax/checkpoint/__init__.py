"""Store a training state as files, one per layer; load it in any layout; export parameters."""
