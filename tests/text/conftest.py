"""The folders of text encoders that several tests read."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import text_files as files


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same encoder in both layouts, one of them in shards too."""
    folder = tmp_path_factory.mktemp("text")
    for name in ("diffusers", "sharded", "wan"):
        (folder / name).mkdir()
    files.save_diffusers(folder / "diffusers", files.make_encoder())
    files.save_diffusers(folder / "sharded", files.make_encoder(), shard="20KB")
    assert len(list((folder / "sharded" / "text_encoder").glob("*.safetensors"))) > 1
    files.save_wan(folder / "wan", files.make_encoder())
    return folder
