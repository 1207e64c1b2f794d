"""How toybox-vin is trained: a VIN and a DiT, end to end. `examples/train_vin.py` runs it."""
