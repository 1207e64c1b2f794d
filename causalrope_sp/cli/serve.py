"""`causalrope-sp serve`: serves live sessions to browsers and programs."""

from __future__ import annotations

import signal
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from causalrope_sp.cli import generate_options
from causalrope_sp.cli.generate import generate, name_lost_rank
from causalrope_sp.cli.numbers import FLOAT, IntRange
from causalrope_sp.cli.options import parse_steps
from causalrope_sp.cli.runtime import rank, set_up_logging
from causalrope_sp.cli.threads import log_threads
from causalrope_sp.errors import ConfigError
from causalrope_sp.siblings import Siblings

PACKAGES = ("fastapi", "uvicorn", "websockets", "prometheus_client", "multipart")  # of the extra `serve`
NOT_SERVED = ("guidance_interval", "decode", "parallel_chunks")
LOADING = tuple(name for name in generate_options.LOADING if name not in NOT_SERVED)
RANKS = ("strategy", "overlap", "head_groups", "attention")
OF_GENERATE = {*LOADING, *RANKS, "steps", "model", "device", "timeout", "verbose", "log_file"}
TOKEN_VARIABLE = "CAUSALROPE_SP_TOKEN"


@click.command(params=[option for option in generate.params if option.name in OF_GENERATE])
@click.option("--host", default="127.0.0.1", show_default=True, help="Listen at this address.")
@click.option("--port", type=IntRange(0, 65535), default=8000, show_default=True, help="Listen at this port; 0: any.")
@click.option(
    "--token",
    envvar=TOKEN_VARIABLE,
    show_envvar=True,
    help="Demand this token of clients; other addresses than loopback need one. The default is none.",
)
@click.option(
    "--allow-origin",
    "origins",
    multiple=True,
    metavar="URL",
    help="Let scripts of pages of this origin connect too, such as https://example.org. The default is none.",
)
@click.option("--max-sessions", type=IntRange(1), default=4, show_default=True, help="Keep this many sessions open.")
@click.option("--max-jobs", type=IntRange(1), default=100, show_default=True, help="Let this many jobs wait.")
@click.option("--max-saved", type=IntRange(1), default=100, show_default=True, help="Keep this many saved sessions.")
@click.option(
    "--lead-seconds",
    type=FLOAT,
    default=1.0,
    show_default=True,
    help="Begin no chunk while this many seconds of video are made and not yet played.",
)
@click.option(
    "--grace",
    "grace_seconds",
    type=FLOAT,
    default=30.0,
    show_default=True,
    help="Let a session wait this many seconds for its viewer to come back.",
)
@click.option(
    "--history", type=IntRange(0), default=4, show_default=True, help="Take this many chunks back bit for bit."
)
@click.option("--upload-mib", type=IntRange(1), default=16, show_default=True, help="Refuse larger requests, in MiB.")
@click.option(
    "--folder",
    type=click.Path(file_okay=False, path_type=Path),
    help="Keep jobs, videos and sessions here. The default is causalrope-sp in the user's state folder.",
)
@click.option(
    "--keep-every-change",
    is_flag=True,
    help="Keep live sessions on disk after every chunk and change, and not only when the server ends.",
)
@click.option(
    "--keep-cache/--no-keep-cache",
    default=True,
    show_default=True,
    help="Keep live sessions with their keys and values, so that they go on bit for bit.",
)
def serve(model: str, device: str | None, timeout: float, verbose: bool, log_file: str | None, **options: Any) -> None:
    """Serves live video at http://HOST:PORT/: a page, a WebSocket, and jobs. Ctrl-C ends it.

    Under torchrun rank 0 listens, and all ranks make the video.
    """
    from causalrope_sp.serving.server_options import ServerOptions

    options["num_inference_steps"] = parse_steps(options.pop("steps"))
    loading, ranks = ({name: options.pop(name) for name in names} for names in (LOADING, RANKS))
    wanted = ServerOptions(**{name: value for name, value in options.items() if value is not None})
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        raise ConfigError(f"serve needs {', '.join(missing)}: pip install 'causalrope-sp[serve]'")
    set_up_logging(verbose, log_file)
    log_threads()
    from causalrope_sp.serving.run import listen

    listening = listen(wanted) if rank() == 0 else None
    from causalrope_sp.devices import check_device
    from causalrope_sp.distributed import SequenceParallel
    from causalrope_sp.pipeline.load_options import LoadOptions
    from causalrope_sp.pipeline.pipeline import CausalVideoPipeline
    from causalrope_sp.serving.commands import follow
    from causalrope_sp.serving.run import serve as run_server

    siblings = Siblings()
    with name_lost_rank(siblings):
        parallel = SequenceParallel.from_env(
            device=None if device is None else check_device(device),
            timeout_s=timeout,
            silence_s=min(20.0, timeout),
            siblings=siblings,
            **ranks,
        )
        pipe = CausalVideoPipeline.from_pretrained(model, LoadOptions(**loading), parallel=parallel)
        if listening is None:
            for number in (signal.SIGINT, signal.SIGTERM):  # torchrun sends them to all ranks; rank 0 tells the others
                signal.signal(number, signal.SIG_IGN)
            follow(pipe)
        else:
            run_server(pipe, Path(model).name, wanted, listening)
        parallel.close()
