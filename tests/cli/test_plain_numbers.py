"""Every numeric option of every command takes plain digits alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from click.testing import CliRunner

from causalrope_sp.cli.main import cli


def _numeric() -> Iterator[tuple[str, str, int]]:
    for name, command in cli.commands.items():
        for option in command.params:
            if "int" in option.type.name or "float" in option.type.name:
                yield name, option.opts[0], option.nargs


NUMERIC = list(_numeric())


def test_there_are_numeric_options_in_all_large_commands() -> None:
    assert {name for name, _, _ in NUMERIC} >= {"generate", "plan", "inspect", "encode", "profile-reuse"}


@pytest.mark.parametrize(("command", "option", "count"), NUMERIC)
@pytest.mark.parametrize("text", ["1_0", "\u0661", "\uff11"])
def test_underscores_and_other_digits_are_refused(command: str, option: str, count: int, text: str) -> None:
    result = CliRunner().invoke(cli, [command, option, *[text] * count], standalone_mode=False)
    assert f"{text!r} is not a number in plain digits" in result.output + str(result.exception)
