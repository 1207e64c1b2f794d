"""Noise levels, solvers and noise: pure mathematics."""
