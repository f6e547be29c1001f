"""Where transformers, tokenizers and checkpoints meet the decoder."""
