"""Text in, fixed windows of token ids out."""
