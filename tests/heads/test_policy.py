"""Policies of heads: what is refused, and the files that they are read from."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from causalrope_sp import ConfigError, StreamConfig
from causalrope_sp.config import stream_fields
from causalrope_sp.errors import OutputError
from causalrope_sp.heads import HeadPolicy, read_heads, write_heads
from causalrope_sp.sessions.session_metadata import config_of

POLICY = HeadPolicy(((None, 5, 0), (4, None, 7)))
NEAR = replace(POLICY, rows=((2, None, None), (None, 1, 3)))


def written(path: Path, value: object) -> Path:
    text = value if isinstance(value, str | bytes) else json.dumps(value)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_a_policy_comes_back_from_its_file(tmp_path: Path) -> None:
    write_heads(POLICY, tmp_path / "heads.json", rule="mass", share=0.8)
    assert json.loads((tmp_path / "heads.json").read_text())["rule"] == "mass"
    assert read_heads(tmp_path / "heads.json", chunk_frames=3, sink=1) == POLICY
    write_heads(NEAR, tmp_path / "heads.json")
    assert read_heads(tmp_path / "heads.json", chunk_frames=3, sink=1) == NEAR != POLICY
    assert (POLICY.shortened, NEAR.shortened) == (4, 6)
    assert replace(POLICY, rows=((None,) * 3,) * 2) == POLICY
    with pytest.raises(OutputError, match="cannot write"):
        write_heads(POLICY, tmp_path / "nowhere" / "heads.json")


def test_a_stream_with_a_policy_comes_back_from_json() -> None:
    for policy in (POLICY, NEAR):
        stream = StreamConfig(9, 1, 3, heads=policy)
        assert config_of(StreamConfig, json.loads(json.dumps(stream_fields(stream)))) == stream
    assert "heads" not in stream_fields(StreamConfig())


def kinds(static: list[list[int]], heads: int, names: tuple[str, str]) -> list[dict[str, Any]]:
    others = [[head for head in range(heads) if head not in layer] for layer in static]
    return [{"layer_idx": n, names[0]: a, names[1]: b} for n, (a, b) in enumerate(zip(static, others))]


@pytest.mark.parametrize("names", [("static_head", "dynamic_head"), ("local_head", "temporal_head")])
@pytest.mark.parametrize("bare", [False, True])
def test_forcing_kv_files_are_read(tmp_path: Path, names: tuple[str, str], bare: bool) -> None:
    """In both forms, and with both pairs of names, that are published; layer 0 stays whole."""
    layers = kinds([[1, 3], [0, 2, 3], []], 4, names)
    whole = {"format": "forcingkv_offline_head_custom2", "num_layers": 3, "num_heads": 4, "layers": layers}
    policy = read_heads(written(tmp_path / "heads.json", layers if bare else whole), chunk_frames=3, sink=2)
    assert policy.windows == ((None,) * 4, (6, None, 6, 6), (None,) * 4)


LAYERS = kinds([[1], [0]], 2, ("static_head", "dynamic_head"))
WRONG: dict[str, tuple[object, str]] = {
    "no JSON": ("{", "not JSON"),
    "no text": (b"\x90\0\0\0\0\0\0\0{", "not JSON but bytes that are no text"),
    "a number": (3, r'expected a list as the file\'s "layers", got 3'),
    "no windows": ({"rules": []}, 'expected "windows", or "layers" as in a file of Forcing-KV'),
    "windows of no lists": ({"windows": [3]}, 'expected an object with "windows", a list of lists'),
    "no layers": ({"windows": []}, "expected 1 to 4096 layers of 1 to 4096 heads, got 0 layers of 0 heads"),
    "no heads": ({"windows": [[]]}, "expected 1 to 4096 layers"),
    "layers that differ": ({"windows": [[5, 5], [5]]}, "expected 2 heads in layer 1, as in layer 0, got 1"),
    "a fraction": ({"windows": [[5, 4.5]]}, "the window of layer 0, head 1 must be a whole number of at least 0"),
    "below 0": ({"windows": [[-1]]}, "the window of layer 0, head 0 must be a whole number of at least 0, not -1"),
    "a text": ({"windows": [["5"]]}, "must be a whole number"),
    "a flag": ({"windows": [[True]]}, "must be a whole number"),
    "a window too small": (
        {"windows": [[None, 3]]},
        r"expected a window of at least chunk \+ sink = 3 \+ 1 latent frames in layer 0, head 1, got 3",
    ),
    "no rows of heads": ({"windows": [[5, 5]], "rows": 3}, 'expected a list of lists as "rows", got 3'),
    "rows of fewer heads": (
        {"windows": [[5, 5]], "rows": [[2]]},
        "expected rows of 2 heads in layer 0, as the windows, got 1",
    ),
    "rows of fewer layers": (
        {"windows": [[5], [5]], "rows": [[2]]},
        "expected rows of 2 layers, as the windows, got 1",
    ),
    "rows alone": ({"rows": [[2]]}, r'expected "windows", or "layers" as in a file of Forcing-KV, got \[\'rows\'\]'),
    "rows beside layers": ({"layers": LAYERS, "rows": [[1, 1]] * 2}, 'expected "windows" beside "rows", got "layers"'),
    "no row": (
        {"windows": [[5, 5]], "rows": [[None, 0]]},
        "the number of rows of layer 0, head 1 must be a whole number of at least 1, not 0",
    ),
    "half a row": ({"windows": [[5]], "rows": [[0.5]]}, "the number of rows of layer 0, head 0 must be a whole number"),
    "a layer left out": (LAYERS[1:], 'expected an object with "layer_idx" 0 as layer 0'),
    "a head twice": ([{"layer_idx": 0, "static_head": [0], "dynamic_head": [0, 1]}], "expected each head of layer 0"),
    "a head left out": ([{"layer_idx": 0, "static_head": [0], "dynamic_head": [2]}], "expected each head of layer 0"),
    "one kind alone": (
        [{"layer_idx": 0, "static_head": [0]}],
        'expected a list as "dynamic_head" of layer 0, got None',
    ),
    "other sizes": ({"num_layers": 3, "layers": LAYERS}, 'expected "num_layers" 2, as it lists, got 3'),
    "heads that differ": ([*LAYERS[:1], {"layer_idx": 1, "static_head": [0], "dynamic_head": []}], "heads in layer 1"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_file_is_refused_in_one_sentence(tmp_path: Path, name: str) -> None:
    value, message = WRONG[name]
    with pytest.raises(ConfigError, match=message) as caught:
        read_heads(written(tmp_path / "heads.json", value), chunk_frames=3, sink=1)
    assert "\n" not in str(caught.value)
    assert "heads.json holds no policy of heads: " in str(caught.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        read_heads(tmp_path / "heads.json", 3, 1)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                ["windows", "rows", "layers", "layer_idx", "static_head", "dynamic_head", "num_heads", "x"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(value=json_values, bits=st.none() | st.binary(max_size=40))
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_file_is_a_policy_or_refused_in_one_sentence(tmp_path: Path, value: object, bits: bytes | None) -> None:
    file = tmp_path / "any.json"
    file.write_bytes(bits if bits is not None else json.dumps(value).encode())
    found: HeadPolicy | str
    try:
        found = read_heads(file, chunk_frames=2, sink=1)
    except ConfigError as error:
        found = str(error)
    if isinstance(found, str):
        assert "\n" not in found
    else:
        assert all(window is None or window == 0 or window >= 3 for layer in found.windows for window in layer)


def test_a_policy_of_another_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="expected windows of 2 layers × 4 heads, got 2 × 3"):
        POLICY.check_model(2, 4)
    with pytest.raises(ConfigError, match="chunk \\+ sink = 3 \\+ 2 latent frames in layer 1, head 0, got 4"):
        StreamConfig(9, 2, 3, heads=POLICY)
    with pytest.raises(ConfigError, match="expected no rows with similar_frames"):
        StreamConfig(9, 1, 3, heads=NEAR, similar_frames=2)
    with pytest.raises(ConfigError, match=r"heads: expected a HeadPolicy .* got 3"):
        StreamConfig(9, 1, 3, heads=3)  # type: ignore[arg-type]
