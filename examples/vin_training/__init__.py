"""The training of toybox-vin, a VIN and its DiT, end to end. `examples/train_vin.py` runs it."""
