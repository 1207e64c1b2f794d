"""Codecs: latents <-> pixel frames, streaming."""
