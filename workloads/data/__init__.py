"""Data: corpora, tokenizers, shards, dialogues, preferences."""
