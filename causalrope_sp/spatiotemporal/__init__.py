"""Video DiTs whose layers attend within a frame, then across frames: Latte and Open-Sora 1.2 (STDiT3)."""
