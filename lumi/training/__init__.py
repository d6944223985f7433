"""A run: its config, folder, log and state; the optimizer; the trainer with the one loop."""
