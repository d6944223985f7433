"""Stage `tokenize`, and what training reads: token stores, rows, batches as functions of (seed, step)."""
