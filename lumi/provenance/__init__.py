"""Where things come from: the chain of recorded hashes, the model card, and the way to the hub."""
