"""Messages and requests that a server must refuse, or obey, without harm: by hypothesis and by schemathesis."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error

from tests.support.servers import Viewer

PROMPTS = st.sampled_from(
    ["a large red circle slides right", "a large green circle slides right", "a pink cat", "", "é\x00"]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=5,
)
NO_CONTROL = JSON.filter(lambda value: not isinstance(value, list)) | st.lists(
    st.sampled_from([float("nan"), float("inf"), 10**400, -10_001, True, None, "1", [0.5]]), max_size=20
)
STEERING = st.one_of(
    st.fixed_dictionaries({"type": st.just("prompt"), "prompt": PROMPTS}, optional={"recache": st.booleans()}),
    st.fixed_dictionaries({"type": st.just("seek"), "chunk": st.integers(-1, 9)}),
    st.fixed_dictionaries({"type": st.sampled_from(["pause", "resume", "open", "nothing"])}),
    st.fixed_dictionaries({"type": st.just("control"), "values": st.lists(st.floats() | st.integers(), max_size=17)}),
    st.fixed_dictionaries({"type": st.just("played"), "sequence": st.integers(-1, 20) | st.none()}),
)
MALFORMED = st.one_of(
    st.fixed_dictionaries(
        {"type": st.sampled_from(["open", "prompt", "control", "seek", "save", "played", "pause"]), "x": JSON}
    ),
    st.fixed_dictionaries({"type": JSON}),
    st.fixed_dictionaries({"type": st.just("prompt"), "prompt": JSON.filter(lambda value: not isinstance(value, str))}),
    st.fixed_dictionaries({"type": st.just("seek"), "chunk": JSON.filter(lambda value: not isinstance(value, int))}),
    st.fixed_dictionaries({"type": st.just("control"), "values": NO_CONTROL}),
)
MANY_OF = 12  # kinds of requests that have parameters, right ones and wrong ones
QUIET: Any = {
    "database": None,
    "deadline": None,
    "derandomize": True,
    "phases": (Phase.generate,),
    "suppress_health_check": list(HealthCheck),
}


def send_messages(url: str, count: int) -> int:
    """Sends malformed messages over one WebSocket, each of which must be refused.

    Args:
        url: of the WebSocket.
        count: about how many.

    Returns:
        How many were refused.
    """
    refused = 0
    with Viewer(url) as viewer:

        @settings(max_examples=max(1, count // 5), **QUIET)
        @given(st.lists(MALFORMED | st.text(max_size=30) | st.binary(max_size=30), min_size=5, max_size=5))
        def send(messages: Sequence[dict[str, Any] | str | bytes]) -> None:
            nonlocal refused
            for message in messages:
                if isinstance(message, dict):
                    number = viewer.send(message["type"], **{k: v for k, v in message.items() if k != "type"})
                else:
                    viewer.socket.send(message)
                    number = None
                answer = viewer.answer(number)
                assert (answer["type"], answer["code"]) == ("error", "wrong_message"), (message, answer)
                refused += 1

        send()
    return refused


def send_requests(url: str, count: int) -> dict[str, int]:
    """Sends requests after the server's own OpenAPI description, none of which may make it fail.

    Args:
        url: of the page.
        count: about how many.

    Returns:
        How many answers there were of each status.
    """
    schema, seen = schemathesis.openapi.from_url(f"{url}openapi.json"), Counter[str]()
    strategies = [
        found.ok().as_strategy(generation_mode=mode) for found in schema.get_all_operations() for mode in GenerationMode
    ]
    for strategy in strategies:

        @settings(max_examples=max(1, count // MANY_OF), **QUIET)
        @given(strategy)
        def send(case: schemathesis.Case) -> None:
            answer = case.call(timeout=60)
            case.validate_response(answer, checks=[not_a_server_error])
            seen[str(answer.status_code)] += 1

        with suppress(Unsatisfiable):  # nothing can be wrong with a request without parameters
            send()
    return dict(sorted(seen.items()))
