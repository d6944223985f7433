"""Where things come from, for whoever gets them: the model card, and the way to the hub."""
