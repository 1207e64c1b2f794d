"""The options of a server, frozen and checked at construction."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from causalrope_sp.checks import check_fields, check_flag, check_number, check_text, check_whole
from causalrope_sp.errors import ConfigError
from causalrope_sp.pipeline.option_checks import replace_checked

LEAST_TOKEN = 16  # characters
MIB = 2**20


def default_folder() -> Path:
    """Returns the folder of this user's server: causalrope-sp below XDG_STATE_HOME, which is ~/.local/state."""
    state = os.environ.get("XDG_STATE_HOME") or os.path.join(os.path.expanduser("~"), ".local", "state")
    return Path(state) / "causalrope-sp"


@dataclass(frozen=True)
class ServerOptions:
    """The options of a server.

    Args:
        host: the address that it listens at.
        port: likewise; 0 takes any that is free.
        token: what clients must show; None for no token, which is allowed on a loopback address alone.
        origins: of pages on other servers whose scripts may connect, such as "https://example.org".
        max_sessions: how many live sessions may be open at once.
        max_saved: how many saved sessions the folder may hold.
        max_jobs: how many jobs may wait.
        lead_seconds: no chunk is begun while so much video is made and not yet played.
        grace_seconds: how long a session waits for its viewer to come back.
        history: how many chunks a session takes back bit for bit.
        upload_mib: the largest body of a request, in MiB.
        folder: where jobs, videos, and saved and kept sessions are.
        keep_every_change: whether live sessions are kept on disk after every chunk and change, and not only when the
            server stops.
        keep_cache: whether they are kept with keys and values, so that they go on bit for bit.

    Raises:
        ConfigError: a value has the wrong type or is outside its range, or a token is missing.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    token: str | None = None
    origins: tuple[str, ...] = ()
    max_sessions: int = 4
    max_saved: int = 100
    max_jobs: int = 100
    lead_seconds: float = 1.0
    grace_seconds: float = 30.0
    history: int = 4
    upload_mib: int = 16
    folder: Path = field(default_factory=default_folder)
    keep_every_change: bool = False
    keep_cache: bool = True

    def __post_init__(self) -> None:
        check_text("host", self.host)
        check_fields(self, ("max_sessions", "max_saved", "max_jobs", "upload_mib"), most=100_000)
        for name in ("keep_every_change", "keep_cache"):
            check_flag(name, getattr(self, name))
        replace_checked(self, "port", partial(check_whole, least=0, most=65535))
        replace_checked(self, "history", partial(check_whole, least=0, most=1000))
        check_number("lead_seconds", self.lead_seconds, above=0, most=3600)
        check_number("grace_seconds", self.grace_seconds, least=0, most=86400)
        if self.token is None:
            if not self.is_loopback:
                raise ConfigError(f"token must be set for host {self.host}, which other machines can reach")
        elif len(self.token) < LEAST_TOKEN or not self.token.isascii() or set(self.token) - _TOKEN_CHARACTERS:
            raise ConfigError(f"token must be at least {LEAST_TOKEN} letters, digits, -, . and _")

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the host."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


_TOKEN_CHARACTERS = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._")
