"""Text to token ids and back: tokenizer, incremental detokenization, stop strings."""
