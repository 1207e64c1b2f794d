"""What a message of a viewer may be."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from causalrope_sp.serving.messages import FIELDS, LONGEST_PROMPT, Message, WrongMessage, read_message

ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
FIELD_NAMES = st.sampled_from(sorted({name for fields in FIELDS.values() for name in fields}))


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("", "a message must be a JSON object"),
        ("[" * 100_000, "a message must be a JSON object"),
        ("9" * 5000, "a message must be a JSON object"),
        ([1], "a message must be a JSON object"),
        ({}, "type must be one of open, prompt, control, played, pause, resume, seek, save, close, not None"),
        ({"type": ["open"]}, "type must be one of"),
        ({"type": "pause", "id": -1}, "id must be"),
        ({"type": "pause", "id": True}, "id must be"),
        ({"type": "pause", "now": True}, "pause has no field 'now'; its fields are none"),
        ({"type": "seek"}, "seek needs the field chunk"),
        ({"type": "seek", "chunk": 1.5}, "chunk must be"),
        ({"type": "prompt", "prompt": " "}, "prompt must be a text that is not empty"),
        ({"type": "prompt", "prompt": "x" * 2001}, f"prompt must have at most {LONGEST_PROMPT} characters, not 2001"),
        ({"type": "prompt", "prompt": "\ud800"}, "half of a surrogate pair"),
        ({"type": "prompt", "prompt": "x", "recache": 1}, "recache must be True or False"),
        ({"type": "open"}, "open needs one of the fields prompt, session and saved"),
        ({"type": "open", "prompt": "x", "saved": "y"}, "open needs one of the fields"),
        ({"type": "open", "session": "x", "seed": 3}, "seed goes with a prompt"),
        ({"type": "open", "saved": "../../etc/passwd"}, "saved must be what the server has given"),
        ({"type": "control"}, "control needs the field values"),
        ({"type": "control", "values": 1.5}, "values must be a list of numbers, not 1.5"),
        ({"type": "control", "values": []}, "values must be a list of numbers, not []"),
        ({"type": "control", "values": [0, True]}, "values must hold numbers of at least -10000 and at most 10000"),
        ({"type": "control", "values": [[0.5]]}, "at most 10000, not [0.5]"),
        ('{"type": "control", "values": [NaN]}', "at most 10000, not nan"),
        ('{"type": "control", "values": [1e999]}', "at most 10000, not inf"),
        ({"type": "control", "values": [10**400]}, "at most 10000, not 1000"),
        ({"type": "open", "session": "x", "control": [0]}, "control goes with a prompt or a saved session"),
        ({"type": "open", "prompt": "x", "media": "gif"}, "media must be one of mp4, jpeg"),
    ],
)
def test_wrong_messages_are_refused_in_a_sentence(message: Any, reason: str) -> None:
    with pytest.raises(WrongMessage) as refused:
        read_message(message if isinstance(message, str) else json.dumps(message))
    assert reason in str(refused.value)


def test_a_wrong_message_keeps_its_number() -> None:
    for text in ('{"type": "nothing", "id": 7}', '{"type": "seek", "id": 7}'):
        with pytest.raises(WrongMessage) as refused:
            read_message(text)
        assert refused.value.id == 7


def test_a_right_message_is_read_with_its_number() -> None:
    text = json.dumps({"type": "prompt", "id": 4, "prompt": "a red circle", "recache": False, "over_chunks": 3})
    assert read_message(text) == Message("prompt", 4, {"prompt": "a red circle", "recache": False, "over_chunks": 3})


def test_a_control_is_read_as_floats() -> None:
    text = json.dumps({"type": "control", "values": [1, -0.5, 10_000]})
    assert read_message(text) == Message("control", None, {"values": [1.0, -0.5, 10_000.0]})


@given(st.sampled_from([*FIELDS, "other"]), st.dictionaries(FIELD_NAMES | st.text(max_size=5), ANYTHING, max_size=4))
def test_any_object_is_read_or_refused(kind: str, fields: dict[str, Any]) -> None:
    with contextlib.suppress(WrongMessage):
        message = read_message(json.dumps({**fields, "type": kind}))
        assert message.fields.keys() <= FIELDS[kind].keys()


@given(st.text(max_size=50) | st.binary(max_size=50).map(lambda data: data.decode("latin-1")))
def test_any_text_is_read_or_refused(text: str) -> None:
    with pytest.raises(WrongMessage):
        read_message(text)
