"""How self-attention crosses ranks: one file a strategy."""
