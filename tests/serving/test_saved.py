"""Sessions that are saved on the server, and opened again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.support.servers import ONE_STEP, Viewer, running_server

RED, GREEN = "a large red circle slides right", "a large green circle slides right"


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_saved_session_goes_on_after_a_restart(tmp_path: Path, ranks: int) -> None:
    words = ("--window", "7", *ONE_STEP)
    with running_server(tmp_path, *words, ranks=ranks) as server, Viewer(server.socket_url) as viewer:
        viewer.ask("open", prompt=RED, seed=4, media="jpeg")
        viewer.next_chunk()
        viewer.ask("prompt", prompt=GREEN)
        viewer.ask("pause")
        saved = [viewer.ask("save", cache=cache) for cache in (True, False)]
        viewer.ask("resume")
        after = saved[0]["from_chunk"]
        assert saved[1]["from_chunk"] == after
        while (right := viewer.next_chunk()).head["chunk"] < after:
            pass
        viewer.ask("close")
    with running_server(tmp_path, *words) as server:
        for number, answer in enumerate(saved):
            with Viewer(server.socket_url) as viewer:
                opened = viewer.ask("open", saved=answer["saved"], media="jpeg")
                assert opened["from_chunk"] == after
                assert [prompt["prompt"] for prompt in opened["prompts"]] == [RED, GREEN]
                seen = viewer.next_chunk()
                assert (seen.head["chunk"], seen.head["first_frame"]) == (after, right.head["first_frame"])
                apart = np.abs(seen.frames.astype(int) - right.frames).mean()
                assert apart < (1 if number == 0 else 8)  # without the cache it is computed anew
                viewer.ask("close")


def test_saved_sessions_are_limited_removed_and_never_a_path(tmp_path: Path) -> None:
    with running_server(tmp_path, "--max-saved", "2", *ONE_STEP) as server, Viewer(server.socket_url) as viewer:
        assert viewer.ask("open", saved="0123abc")["code"] == "not_saved"
        assert viewer.ask("open", saved="../jobs/x")["code"] == "wrong_message"
        viewer.ask("open", prompt=RED)
        viewer.next_chunk()  # before it there is nothing to be saved
        names = [viewer.ask("save")["saved"] for _ in range(2)]
        assert viewer.ask("save")["code"] == "too_many_saved"
        assert {path.stem for path in (tmp_path / "sessions").iterdir()} == set(names)
        assert server.delete(f"v1/sessions/{names[0]}").json() == {"saved": names[0], "deleted": True}
        for name in (names[0], "..%2flock", "lock"):
            assert server.delete(f"v1/sessions/{name}").status_code == 404
        assert (tmp_path / "lock").exists()
        assert viewer.ask("save")["type"] == "ack"


def test_a_file_that_is_no_session_is_refused_without_its_path(tmp_path: Path) -> None:
    with running_server(tmp_path, *ONE_STEP) as server, Viewer(server.socket_url) as viewer:
        (tmp_path / "sessions" / "0123abc.safetensors").write_bytes(b"nonsense")
        refused = viewer.ask("open", saved="0123abc")
        assert (refused["code"], refused["message"]) == ("refused", "the server cannot do that: see its log")
        assert viewer.ask("open", prompt=RED)["type"] == "ack"
        assert viewer.next_chunk().head["chunk"] == 0
