"""Folders and files of others: transformers, PEFT, GGUF."""
