"""The chunked sampler."""
