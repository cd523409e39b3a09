"""The parts that the zoo's networks are made of, and the description of a layer."""
