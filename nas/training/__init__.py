"""Train candidates: two builders of the same networks, and the training of either's."""
