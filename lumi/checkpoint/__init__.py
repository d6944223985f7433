"""Checkpoints that are whole or absent, in pieces, written behind the loop."""
