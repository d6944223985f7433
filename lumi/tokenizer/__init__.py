"""Stage `tokenizer`: SentencePiece BPE made, read and applied."""
