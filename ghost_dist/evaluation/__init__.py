"""How good a model is: perplexity over fixed windows."""
