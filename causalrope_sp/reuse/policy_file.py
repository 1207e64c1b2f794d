"""Policies by name, and as JSON files: {"rules": [{"kind": "self", "every": 2, "timesteps": [100, 800]}, …]}.

"stored" beside the rules is "ungated", which is the default, or "gated"; see `ReusePolicy`.

A rule has `kind`, and either `every`, with `timesteps` [low, high] and `steps` [first, stop] as options, or `after`
[timestep, …] with `steps`. Both forms have `layers` [number, …] as an option. See `Broadcast` and `After`.
"""

from __future__ import annotations

import json
from os import PathLike, fspath
from os.path import isfile
from pathlib import Path
from typing import Any

from causalrope_sp.errors import ConfigError, printable
from causalrope_sp.io.json_files import read_object
from causalrope_sp.io.report_files import write_text
from causalrope_sp.reuse.policy import After, Broadcast, ReusePolicy, Rule
from causalrope_sp.reuse.policy_presets import PRESETS

PREFIX = "pab:"


def find_policy(policy: ReusePolicy | str | PathLike[str]) -> ReusePolicy:
    """Finds a policy by name.

    Args:
        policy: a policy, which is returned as it is; a preset as NAME or pab:NAME; or a JSON file as FILE or pab:FILE.

    Returns:
        The policy.

    Raises:
        ConfigError: there is no preset or file of this name, or the file holds no policy.
    """
    if isinstance(policy, ReusePolicy):
        return policy
    name = fspath(policy).removeprefix(PREFIX)
    if name in PRESETS:
        return PRESETS[name]
    if not isfile(name):
        raise ConfigError(f"no policy of reuse {printable(name)!r}: not a file, not one of {', '.join(PRESETS)}")
    try:
        fields = read_object(Path(name))
        if not isinstance(fields.get("rules"), list):
            raise ValueError('it must be an object with a list of "rules"')
        return ReusePolicy(tuple(_rule(rule) for rule in fields["rules"]), fields.get("stored", "ungated"))
    except (ValueError, TypeError, OverflowError) as reason:
        raise ConfigError(f"{name} holds no policy of reuse: {printable(reason)}") from reason


def write_policy(policy: ReusePolicy, path: Path, **notes: Any) -> None:
    """Writes a policy to a JSON file that `find_policy` reads.

    Args:
        policy: the policy.
        path: the file.
        **notes: further fields for human readers, which `find_policy` ignores.

    Raises:
        OutputError: the file cannot be written.
    """
    fields = {**notes, "stored": policy.stored, "rules": [_fields(rule) for rule in policy.rules]}
    write_text(json.dumps(fields, indent=1) + "\n", path)


def _rule(fields: Any) -> Rule:
    """Makes a rule of its JSON object; raises ValueError, TypeError or ConfigError if it is none."""
    if not isinstance(fields, dict) or "kind" not in fields or ("every" in fields) == ("after" in fields):
        raise ValueError(f"a rule has a kind and either every or after, not {str(fields)[:80]}")
    values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()}
    unknown = values.keys() - {"kind", "every", "after", "timesteps", "steps", "layers"}
    lists = {name for name in ("after", "timesteps", "layers") if not isinstance(values.get(name, ()), tuple)}
    if unknown or lists:
        raise ValueError(f"a rule has no {', '.join(unknown)}" if unknown else f"{', '.join(lists)} must be a list")
    if "after" in values:
        return After(timesteps=values.pop("after"), **values)
    return Broadcast(**values)


def _fields(rule: Rule) -> dict[str, Any]:
    """Returns the JSON object of a rule."""
    if isinstance(rule, After):
        found = {"kind": rule.kind, "after": rule.timesteps, "steps": rule.steps, "layers": rule.layers}
    else:
        found = {"kind": rule.kind, "every": rule.every, "timesteps": rule.timesteps, "steps": rule.steps}
        found["layers"] = rule.layers
    return {name: value for name, value in found.items() if value is not None}
