"""Records of other versions are read, and what is none is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from features.errors import CorankError
from pipeline.records import DamagedRecordError, Records
from pipeline.stages.challenger import CHALLENGER, Cuts
from pipeline.stages.evaluation import EVALUATION
from pipeline.stages.samples import SAMPLES, SamplesRecord
from tests.damages import empty, flip, halve


def test_a_record_of_another_version_is_read_with_what_it_lacks_and_without_what_is_unknown(tmp_path: Path) -> None:
    records = Records(str(tmp_path))
    records.write(SAMPLES, "2026-01-05", SamplesRecord(inputs="a", candidates=3))
    document = records.get("samples", "2026-01-05") or {}
    del document["users"]
    records.put("samples", "2026-01-05", {**document, "invented": 1})
    assert records.read(SAMPLES, "2026-01-05") == SamplesRecord(inputs="a", candidates=3)
    assert records.read(SAMPLES, "2026-01-06") is None
    with pytest.raises(CorankError, match=r"samples has no record for 2026-01-06; run `corank run` first"):
        records.require(SAMPLES, "2026-01-06")


def test_a_record_without_inputs_was_made_from_what_its_key_is_the_digest_of(tmp_path: Path) -> None:
    records = Records(str(tmp_path))
    records.put("evaluation", "key", {"passed": True})
    assert records.require(EVALUATION, "key").inputs == "key"


def test_a_challenger_that_an_earlier_version_called_candidate_is_read(tmp_path: Path) -> None:
    records = Records(str(tmp_path))
    records.put("candidate", "key", {"artifact": "models/old", "cuts": {"train": 1, "validation": 2, "test": 3}})
    record = records.require(CHALLENGER, "key")
    assert (record.artifact, record.cuts) == ("models/old", Cuts(1, 2, 3))


def test_a_record_whose_values_are_of_another_kind_is_named_with_what_to_do(tmp_path: Path) -> None:
    records = Records(str(tmp_path))
    records.put("samples", "2026-01-05", {"inputs": "a", "candidates": "many"})
    with pytest.raises(CorankError, match=r"record .*samples/2026-01-05.json is damaged .*candidates.*corank repair"):
        records.read(SAMPLES, "2026-01-05")


@pytest.mark.parametrize("damage", [empty, halve, flip])
def test_a_record_that_is_not_what_was_written_is_named(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    records = Records(str(tmp_path))
    records.write(SAMPLES, "2026-01-05", SamplesRecord(inputs="a", candidates=3))
    assert list(records.documents()) == [("samples", "2026-01-05")]
    damage(tmp_path / "samples" / "2026-01-05.json")
    with pytest.raises(DamagedRecordError, match=r"record .*samples/2026-01-05.json is damaged .* `corank repair`"):
        records.read(SAMPLES, "2026-01-05")
    records.discard(SAMPLES, "2026-01-05")
    assert records.read(SAMPLES, "2026-01-05") is None
