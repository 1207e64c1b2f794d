"""Head-wise windows: how many latent frames each attention head of each layer sees, and where heads are placed."""

from causalrope_sp.heads.policy import HeadPolicy
from causalrope_sp.heads.policy_file import read_heads, write_heads

__all__ = ["HeadPolicy", "read_heads", "write_heads"]
