"""Predicts the cost of a stream from sizes alone, and chooses its attention strategy."""
