"""`Transformer(config, ops)`, and LoRA, which replaces its linears from outside."""
