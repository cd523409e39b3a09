"""Write the winner of a search to a file: its genotype, or a config for `gpipe train`."""
