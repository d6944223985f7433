"""KV cache, sampling, batched decoding, dialogue."""
