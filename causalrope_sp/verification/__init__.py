"""Checks of the computed numbers on this machine."""
