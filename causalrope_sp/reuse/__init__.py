"""Reuse of layer outputs between denoise passes: Pyramid Attention Broadcast (PAB, arXiv 2408.12588)."""

from causalrope_sp.reuse.policy import After, Broadcast, Kind, ReusePlan, ReusePolicy
from causalrope_sp.reuse.policy_file import find_policy, write_policy
from causalrope_sp.reuse.policy_presets import PRESETS

__all__ = ["PRESETS", "After", "Broadcast", "Kind", "ReusePlan", "ReusePolicy", "find_policy", "write_policy"]
