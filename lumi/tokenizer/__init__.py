"""Stage `tokenizer`: SentencePiece BPE models, made, read and applied."""
