"""KV cache, sampling, batched decoding, JSON lines, dialogue."""
