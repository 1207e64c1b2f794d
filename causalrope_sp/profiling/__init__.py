"""Measures how much the outputs of a model's blocks change from pass to pass, and derives a policy of reuse."""
