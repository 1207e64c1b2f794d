"""The KV cache and the integer arithmetic of its sliding window."""
