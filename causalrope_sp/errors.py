"""Wrong input, by kind. Every message is one line that names what is wrong and what would be right."""

from __future__ import annotations


class CausalRopeError(ValueError):
    """Base of every error that wrong input causes; the command line turns it into one line and status 2."""


class ConfigError(CausalRopeError):
    """A configuration, size, window or strategy that cannot work."""


class PromptError(CausalRopeError):
    """A prompt that the model's text encoder does not know."""


class CheckpointError(CausalRopeError):
    """A checkpoint that cannot be read, or does not hold what its layout promises."""


class InputError(CausalRopeError):
    """A picture or video that cannot be read."""


class OutputError(CausalRopeError):
    """An output file or folder that cannot be written."""


class RankLostError(RuntimeError):
    """No wrong input: another rank of the stream is gone, stopped or stuck."""
