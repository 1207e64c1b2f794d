"""How toybox is trained: codec, latents, teacher, student. `examples/train_toybox.py` runs it."""
