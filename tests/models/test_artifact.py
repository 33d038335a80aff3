"""A damaged artifact is never loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from features.errors import CorankError
from models.artifact import load_artifact, read_document, save_artifact
from tests.models.batches import make_schema
from tests.models.variants import make_model


def test_every_damaged_file_is_named_however_it_is_read(tmp_path: Path) -> None:
    model = make_model(make_schema(), "ui-mixformer", double=False)
    version = save_artifact(tmp_path / "m", model, {"lineage": {"seed": 1}})
    assert load_artifact(tmp_path / "m").version == version
    assert read_document(tmp_path / "m", "lineage") == {"seed": 1}
    for file in ("model.safetensors", "model.yaml", "lineage.json"):
        path = tmp_path / "m" / file
        whole = path.read_bytes()
        path.write_bytes(whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:])
        with pytest.raises(CorankError, match=rf"{file} is damaged"):
            load_artifact(tmp_path / "m")
        if file == "lineage.json":
            with pytest.raises(CorankError, match=r"lineage\.json is damaged"):
                read_document(tmp_path / "m", "lineage")
        path.write_bytes(whole)
    sums = tmp_path / "m" / "SHA256SUMS"
    lines = sums.read_text().splitlines()
    for number, line in enumerate(lines):
        if "model" in line:  # what is not listed would not be verified
            sums.write_text("\n".join(lines[:number] + lines[number + 1 :]))
            with pytest.raises(CorankError, match="SHA256SUMS is damaged"):
                load_artifact(tmp_path / "m")
