"""Whether the numbers are right on this machine."""
