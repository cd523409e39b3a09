"""Store stages that differ in arrays of equal shapes on every device."""
