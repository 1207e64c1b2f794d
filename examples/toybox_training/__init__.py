"""How toybox is trained: codec, latents, DiT. `examples/train_toybox.py` runs it."""
