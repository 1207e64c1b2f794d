"""Noise levels, solvers and noise: pure functions of numbers and tensors."""
