"""Command lines with a wrong value for each option of each command, from click's own list of options."""

from __future__ import annotations

from collections.abc import Iterator

import click

PROMPT = "a red circle slides right"
WHOLE = {
    "generate": ["generate", PROMPT, "--frames", "1", "--out", "one.mp4"],
    "encode": ["encode", PROMPT],
    "inspect": ["inspect", "toybox"],
    "verify": ["verify", "--ranks", "1"],
    "plan": ["plan", "--model", "toybox"],
    "profile-reuse": ["profile-reuse", PROMPT, "--frames", "1"],
    "profile-heads": ["profile-heads", PROMPT, "--frames", "33"],
    "serve": ["serve", "--port", "0", "--folder", "served"],
    "bench": ["bench", PROMPT, "--frames", "1", "--runs", "1"],
    "compress": ["compress", "one.mp4", "one.cvc", "--prompt", PROMPT],
    "decompress": ["decompress", "one.cvc", "back.mp4"],
}  # lines that work, one a command, in this order: some read what others write
# No device is among them: a command that writes to a name may replace what has it, and root may replace /dev/null.
VALUES = (
    *("", " ", "x" * 300, "x" * 251 + ".mp4", "x" * 5000, "/", ".", "..", "~", "~nobody/x"),
    *("nowhere/x.mp4", "a/b", "a/b/c", "a//b", "\x1b[31mred\x1b[0m", "a\nb", "a\rb", "\u202eb", "\udcff", "é", "%s"),
    *("0", "-1", "1", "2", "1_0", "１", "٣", "0x10", "1e3", "1e999", "-1e999", "nan", "inf", "9" * 30, "9" * 5000),
    *("0.5", "1,2", "1000,500", "1000,", ",", "1e400,1", "cpu", "cpu:1", "cuda", "cuda:99999999999", "cuda:x", "meta"),
    *("mps:0", "vulkan", "none", "auto", "toybox", "toybox-vin", "wan2.1-14b", "pab:", "pab:latte", "{}", "--", "-"),
)


def option_lines() -> Iterator[list[str]]:
    """Yields the words of each line: a line that works, with one option set to one value of `VALUES`, or an argument
    replaced by it."""
    from causalrope_sp.cli.main import cli

    missing = set(cli.commands) - set(WHOLE)
    assert not missing, f"no line that works is known for {missing}"
    for name, command in cli.commands.items():
        arguments = [parameter for parameter in command.params if isinstance(parameter, click.Argument)]
        for parameter in command.params:
            place = 1 + arguments.index(parameter) if isinstance(parameter, click.Argument) else 0
            yield from _lines(WHOLE[name], parameter, place)


def _lines(whole: list[str], parameter: click.Parameter, place: int) -> Iterator[list[str]]:
    """The lines of a parameter; `place` is that of an argument among the words."""
    if isinstance(parameter, click.Argument):
        given = len(whole) > place and not whole[place].startswith("-")
        for value in VALUES:
            yield [*whole[:place], value, *whole[place + 1 :]] if given else [*whole, value]
        return
    assert isinstance(parameter, click.Option)
    for name in (*parameter.opts, *parameter.secondary_opts):
        if parameter.is_flag:
            yield [*whole, name]
            yield [*whole, f"{name}=x"]
            continue
        for value in VALUES:
            yield [*whole, name, *[value] * parameter.nargs]
