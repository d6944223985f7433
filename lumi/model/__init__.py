"""`Transformer(config, ops)`, and LoRA, which is put on from outside."""
