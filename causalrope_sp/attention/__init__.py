"""The strategies by which self-attention crosses ranks, one file each."""
