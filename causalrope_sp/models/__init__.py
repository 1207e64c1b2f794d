"""The transformer and its rotary positions."""
