"""Counts the situations of `situations.py`, files in the layouts that people have, that pass.

    python benchmarks/file_situations.py [--section adapters] [--list]

Each situation is shown by tests, which write the files through the libraries that people write them with (diffusers,
transformers, PEFT, LyCORIS, gguf, Pillow, PyAV) and compare with these libraries' own numbers. One passes if all its
tests ran and passed. Prints a table with the number of cases of each; the last line is JSON, and the exit status 1 if
one fails.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

import click
from printed import finish, print_table
from situations import SECTIONS, Situation

TESTS = Path(__file__).parent.parent / "tests"


def node(test: str) -> tuple[str, str, str]:
    """Splits the name of a test: the file below tests/, how the function's name begins, and how its cases begin."""
    file, function = test.split("::")
    folder, name = file.split("/")
    function, bracket, cases = function.partition("[")
    return f"{folder}/test_{name}.py", f"test_{function}", bracket + cases


def shows(test: str, file: str, case: str) -> bool:
    """Returns whether a case of a test file, such as `test_gguf[Q8_0]`, is one of a test."""
    own_file, function, cases = node(test)
    name, _, _ = case.partition("[")
    begins = case.startswith(f"{function}{cases}") if cases else name.startswith(function)
    return file == own_file and begins


def functions_of(tests: list[str]) -> list[str]:
    """The nodes that pytest is given for tests: every function of theirs, with all its cases."""
    nodes = dict[str, None]()
    for test in tests:
        file, function, _ = node(test)
        names = [
            line.removeprefix("def ").partition("(")[0]
            for line in (TESTS / file).read_text().splitlines()
            if line.startswith(f"def {function}")
        ]
        if not names:
            raise click.ClickException(f"{file} has no test that begins with {function}")
        nodes |= dict.fromkeys(f"{TESTS / file}::{name}" for name in names)
    return list(nodes)


def run(tests: list[str]) -> list[tuple[str, str, bool]]:
    """Runs tests; returns the file, the case and whether it passed, of each case."""
    with tempfile.TemporaryDirectory() as folder:
        xml = Path(folder) / "results.xml"
        command = [sys.executable, "-m", "pytest", "-q", "--no-header", f"--junitxml={xml}", *functions_of(tests)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=TESTS.parent)
        if not xml.exists():
            raise click.ClickException(done.stdout[-2000:] + done.stderr[-2000:])
        cases = ElementTree.parse(xml).getroot().iter("testcase")
        return [
            ("/".join(case.attrib["classname"].split(".")[1:]) + ".py", case.attrib["name"], len(case) == 0)
            for case in cases
        ]


def verdict(situation: Situation, found: list[tuple[str, str, bool]]) -> tuple[int, int]:
    """The cases of a situation, and how many passed; a test without any counts as one that failed."""
    passed = total = 0
    for test in situation.tests:
        own = [fine for file, case, fine in found if shows(test, file, case)]
        total, passed = total + max(1, len(own)), passed + sum(own)
    return total, passed


@click.command()
@click.option("--section", "names", multiple=True, type=click.Choice(list(SECTIONS)), help="The default is all.")
@click.option("--list", "only_list", is_flag=True, help="Check that the tests exist, and run none.")
def main(names: tuple[str, ...], only_list: bool) -> None:
    """Runs the tests of all situations, and counts those that pass."""
    chosen = [(name, each) for name in names or SECTIONS for each in SECTIONS[name]]
    tests = [test for _, situation in chosen for test in situation.tests]
    functions = functions_of(tests)
    found = [] if only_list else run(tests)
    rows, passing = [], 0
    for section, situation in chosen:
        total, passed = verdict(situation, found)
        passing += total == passed
        shown = "" if only_list else f"{'pass' if total == passed else 'FAIL'}, {passed} of {total} cases"
        rows.append((section, situation.file, situation.happens, shown))
    print_table(("section", "file", "what happens", "shown"), rows)
    if not only_list:
        print(f"{passing} of {len(chosen)} situations pass, in {len(found)} cases")
    finish("file_situations", situations=len(chosen), passing=passing, cases=len(found), functions=len(functions))
    if not only_list and passing < len(chosen):
        sys.exit(1)


if __name__ == "__main__":
    main()
