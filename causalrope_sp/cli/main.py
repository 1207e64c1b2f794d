"""The group of all commands. Exit status: 0 done, 1 a check or the program failed, 2 wrong input, 130 interrupted.

Under torchrun every rank runs the same command; only rank 0 prints, shows progress and writes the video.
"""

from __future__ import annotations

import click

from causalrope_sp.cli.bench import bench
from causalrope_sp.cli.compress import compress, decompress
from causalrope_sp.cli.encode import encode
from causalrope_sp.cli.generate import generate
from causalrope_sp.cli.inspect import inspect
from causalrope_sp.cli.plan import plan
from causalrope_sp.cli.profile_heads import profile_heads
from causalrope_sp.cli.profile_reuse import profile_reuse
from causalrope_sp.cli.runtime import CommandLine, run
from causalrope_sp.cli.serve import serve
from causalrope_sp.cli.threads import settle_threads
from causalrope_sp.cli.verify import verify
from causalrope_sp.siblings import end_with_launcher
from causalrope_sp.version import __version__


@click.group(
    cls=CommandLine,
    no_args_is_help=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)
@click.version_option(__version__, prog_name="causalrope-sp")
def cli() -> None:
    """Generates video with causal diffusion transformers, chunk by chunk, on one process or many.

    Several processes are started by torchrun: torchrun --standalone --nproc-per-node 2 -m causalrope_sp generate ...
    """


COMMANDS = (generate, encode, inspect, verify, plan, profile_reuse, profile_heads, bench, serve, compress, decompress)
for command in COMMANDS:
    cli.add_command(command)


def main() -> None:
    """Runs the command line of this process; it is the entry point of `causalrope-sp`."""
    settle_threads()
    end_with_launcher()
    run(cli)
