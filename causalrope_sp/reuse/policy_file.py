"""Policies by name, and as JSON: {"rules": [{"kind": "self", "every": 2, "timesteps": [100, 800]}, …]}.

A rule has `kind`, and either `every` with any of `timesteps` [low, high] and `steps` [first, stop], or `after`
[timestep, …] with `steps`; either may have `layers` [number, …]. See `Broadcast` and `After`.
"""

from __future__ import annotations

import json
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from causalrope_sp.errors import ConfigError, OutputError
from causalrope_sp.reuse.policy import After, Broadcast, ReusePolicy, Rule
from causalrope_sp.reuse.policy_presets import PRESETS

PREFIX = "pab:"
LONGEST_REASON = 200  # characters; a file may hold words of any length
LONGEST = 1 << 20  # bytes; a policy that names every layer of a large model is a thousandth of it


def find_policy(policy: ReusePolicy | str | PathLike[str]) -> ReusePolicy:
    """A policy as it is, one of the presets as pab:NAME, or one from a JSON file, as pab:FILE or FILE.

    Raises:
        ConfigError: no preset and no file of this name, or a file that holds no policy.
    """
    if isinstance(policy, ReusePolicy):
        return policy
    name = fspath(policy).removeprefix(PREFIX)
    if name in PRESETS:
        return PRESETS[name]
    if not Path(name).is_file():
        raise ConfigError(f"no policy of reuse {name!r}: not a file, not one of {', '.join(PRESETS)}")
    try:
        if Path(name).stat().st_size > LONGEST:
            raise ValueError("it is too long")
        fields = json.loads(Path(name).read_text())
        if not isinstance(fields, dict) or not isinstance(fields.get("rules"), list):
            raise ValueError('it must be an object with a list of "rules"')
        return ReusePolicy(tuple(_rule(rule) for rule in fields["rules"]))
    except (OSError, ValueError, TypeError, RecursionError) as reason:
        raise ConfigError(f"{name} holds no policy of reuse: {str(reason)[:LONGEST_REASON]}") from reason


def write_policy(policy: ReusePolicy, path: Path, **notes: Any) -> None:
    """Into a JSON file that `find_policy` reads; `notes` are fields beside the rules, for people.

    Raises:
        OutputError: it cannot be written.
    """
    try:
        path.write_text(json.dumps({**notes, "rules": [_fields(rule) for rule in policy.rules]}, indent=1) + "\n")
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error


def _rule(fields: Any) -> Rule:
    if not isinstance(fields, dict) or "kind" not in fields or ("every" in fields) == ("after" in fields):
        raise ValueError(f"a rule has a kind and either every or after, not {str(fields)[:80]}")
    given: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()}
    unknown = given.keys() - {"kind", "every", "after", "timesteps", "steps", "layers"}
    lists = {name for name in ("after", "timesteps", "layers") if not isinstance(given.get(name, ()), tuple)}
    if unknown or lists:
        raise ValueError(f"a rule has no {', '.join(unknown)}" if unknown else f"{', '.join(lists)} must be a list")
    if "after" in given:
        return After(timesteps=given.pop("after"), **given)
    return Broadcast(**given)


def _fields(rule: Rule) -> dict[str, Any]:
    if isinstance(rule, After):
        found = {"kind": rule.kind, "after": rule.timesteps, "steps": rule.steps, "layers": rule.layers}
    else:
        found = {"kind": rule.kind, "every": rule.every, "timesteps": rule.timesteps, "steps": rule.steps}
        found["layers"] = rule.layers
    return {name: value for name, value in found.items() if value is not None}
