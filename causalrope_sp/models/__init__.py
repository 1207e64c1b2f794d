"""The causal DiT and its rotary tables."""
