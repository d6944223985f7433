"""Stage `tokenize`, and what training reads: the token store, rows, batches as functions of (seed, step)."""
