"""The published model: a directory of safetensors and YAML/JSON, loaded without pickle.

``model.safetensors`` (weights and number statistics), ``model.yaml`` (sizes and schema), ``metrics.json``,
``lineage.json``, ``selfcheck.json`` (requests with the scores they must give), and ``SHA256SUMS``, written last.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from features.errors import CorankError, writing
from features.schema import Schema
from models.protocol import RankingModel
from models.registry import rebuild_model

SCHEMA_VERSION = 2
REMEDY = "`corank repair` restores it from MLflow's copy, or drops it, so that `corank run` trains again"


@dataclass
class Artifact:
    """A loaded model. ``version`` is the digest of its content; ``metadata`` holds metrics and lineage."""

    model: RankingModel
    schema: Schema
    version: str
    metadata: dict[str, Any]


def save_artifact(directory: str | Path, model: RankingModel, documents: Mapping[str, Any]) -> str:
    """Write an artifact so that it appears whole or not at all.

    Args:
        documents: file stem → JSON content, e.g. ``metrics``, ``lineage``, ``selfcheck``.

    Raises:
        NoSpaceError

    Returns:
        its version: 12 hex digits of the digest of weights and description.
    """
    target = Path(directory)
    scratch = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    with writing(target, sum(tensor.nbytes for tensor in weights.values())):
        sums = _write(scratch, model, weights, documents)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(scratch, target)
    return _version(sums)


def _write(
    scratch: Path, model: RankingModel, weights: Mapping[str, Tensor], documents: Mapping[str, Any]
) -> dict[str, str]:
    """Write all files of an artifact, the digests last; returns the digests."""
    save_file(dict(weights), scratch / "model.safetensors")
    description = {
        "schema_version": SCHEMA_VERSION,
        "config": model.describe(),
        "schema": model.schema.model_dump(mode="json"),
    }
    (scratch / "model.yaml").write_text(yaml.safe_dump(description, sort_keys=False), encoding="utf-8")
    for stem, content in documents.items():
        (scratch / f"{stem}.json").write_text(
            json.dumps(content, indent=1, sort_keys=True, default=str), encoding="utf-8"
        )
    sums = {path.name: _sha256(path) for path in sorted(scratch.iterdir())}
    (scratch / "SHA256SUMS").write_text("".join(f"{value}  {name}\n" for name, value in sums.items()))
    return sums


def load_artifact(directory: str | Path) -> Artifact:
    """Load and verify an artifact.

    Raises:
        CorankError: the directory is no artifact, is damaged (the file is named), or of a newer layout.
    """
    directory = Path(directory)
    sums = _sums(directory)
    for name in sums:
        _verify(directory, name, sums)
    description = yaml.safe_load((directory / "model.yaml").read_text(encoding="utf-8"))
    if description["schema_version"] > SCHEMA_VERSION:
        raise CorankError(f"model {directory}: written by a newer corank (layout {description['schema_version']})")
    if description["schema_version"] < SCHEMA_VERSION:
        raise CorankError(f"model {directory}: written by an older corank; train anew in another workspace")
    schema = Schema.model_validate(description["schema"])
    model = rebuild_model(schema, description["config"])
    model.load_state_dict(load_file(directory / "model.safetensors"))
    metadata = {
        path.stem: json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(directory.glob("*.json"))
        if path.name in sums
    }
    return Artifact(model.eval(), schema, _version(sums), metadata)


def problem_of_artifact(directory: str | Path) -> str | None:
    """What is wrong with an artifact's files, all of which are read; None when they are as they were written."""
    directory = Path(directory)
    try:
        sums = _sums(directory)
        for name in sums:
            _verify(directory, name, sums)
    except CorankError as error:
        return str(error).removeprefix(f"model {directory}: ").removesuffix(f"; {REMEDY}")
    return None


def is_complete(directory: str | Path) -> bool:
    """Whether all files of an artifact are there; what they hold is not read."""
    directory = Path(directory)
    try:
        return all((directory / name).is_file() for name in _sums(directory))
    except CorankError:
        return False


def version_of(directory: str | Path) -> str:
    """Version of an artifact's content, without loading it.

    Raises:
        CorankError: the directory is no artifact.
    """
    return _version(_sums(Path(directory)))


def read_document(directory: str | Path, stem: str) -> Any:
    """One of the documents of an artifact, verified, without the model.

    Raises:
        CorankError: as :func:`load_artifact`.
    """
    directory = Path(directory)
    _verify(directory, f"{stem}.json", _sums(directory))
    return json.loads((directory / f"{stem}.json").read_text(encoding="utf-8"))


def _sums(directory: Path) -> dict[str, str]:
    listing = directory / "SHA256SUMS"
    if not listing.is_file():
        raise CorankError(f"model {directory}: not a model artifact (SHA256SUMS is missing)")
    lines = listing.read_bytes().decode(errors="replace").splitlines()
    sums = {name: value for value, _, name in (line.partition("  ") for line in lines)}
    for name in ("model.safetensors", "model.yaml"):
        if name not in sums:
            raise CorankError(f"model {directory}: SHA256SUMS is damaged (it does not name {name}); {REMEDY}")
    return sums


def _verify(directory: Path, name: str, sums: Mapping[str, str]) -> None:
    if not (directory / name).is_file() or _sha256(directory / name) != sums.get(name):
        raise CorankError(f"model {directory}: {name} is damaged; {REMEDY}")


def _version(sums: Mapping[str, str]) -> str:
    return hashlib.sha256(f"{sums['model.safetensors']}{sums['model.yaml']}".encode()).hexdigest()[:12]


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
