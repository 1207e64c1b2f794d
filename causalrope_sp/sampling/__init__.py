"""Sampling of an autoregressive stream, chunk by chunk."""
