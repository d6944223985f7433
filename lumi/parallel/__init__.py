"""The processes of a run: their layout, their group, the model among them, and who hangs."""
