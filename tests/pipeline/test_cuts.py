"""What is trained on and judged by: from scratch, and over many retrainings; on real samples, without training."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from features.errors import CorankError
from features.samples.source import Replay, SampleSource
from pipeline.importers.synthetic import import_synthetic
from pipeline.progress import Progress
from pipeline.stages.challenger import _replay
from pipeline.stages.cuts import Cuts, cuts_from_scratch, cuts_of_retraining
from pipeline.stages.samples import FOREVER, SAMPLES, sample_source
from pipeline.stages.validated import VALIDATED
from pipeline.training.settings import TooFewError, extent
from pipeline.workspace import Workspace
from pipeline.workspace.registry import ModelVersion
from tests.pipeline.workspaces import START, load

DAYS = [f"2026-01-{day:02}" for day in range(5, 17)]
DAY = 24 * 3_600 * 1_000_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> Path:
    """Twelve days of a small log, built."""
    folder = tmp_path_factory.mktemp("cuts")
    import_synthetic(folder / "data", days=12, users=30, items=30, seed=5, start=START, buckets=2, say=lambda _: None)
    built = workspace(folder)
    VALIDATED.run(built, built.partitions)
    SAMPLES.run(built, built.partitions)
    return folder


def workspace(folder: Path, until: str | None = None, **changes: Any) -> Workspace:
    return Workspace(load(folder, folder / "data", **changes), Progress(), until)


def version(folder: Path, **lineage: Any) -> ModelVersion:
    """A version whose artifact holds nothing but its lineage."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"cuts": {"train": 0, "validation": 0, "test": 0}, **lineage}).encode()
    (folder / "lineage.json").write_bytes(text)
    names = {"lineage.json": hashlib.sha256(text).hexdigest(), "model.safetensors": "-", "model.yaml": "-"}
    (folder / "SHA256SUMS").write_text("".join(f"{digest}  {name}\n" for name, digest in names.items()))
    return ModelVersion(1, str(folder), {}, ())


def requests(source: SampleSource) -> list[tuple[int, str]]:
    """ts and id of every request, in order."""
    found = []
    for file in source.files():
        rows = source.read(file)
        if rows.num_rows:
            flat = pa.concat_arrays(rows["requests"].chunks).flatten()
            found += zip(flat.field("ts").to_pylist(), flat.field("request_id").to_pylist(), strict=True)
    return sorted(found)


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_over_ten_retrainings_every_request_is_trained_on_exactly_once(folder: Path, tmp_path: Path) -> None:
    """But for the newest share of the last day; and of every new day at least nine tenths are."""
    first = workspace(folder, DAYS[1], holdout={"test": 0.1, "validation": 0.1})
    refitted = first.log.bounds(DAYS[1])[1]
    trained = Counter(requests(sample_source(first, 0, refitted)))
    champion = version(tmp_path / "0", trained_until=refitted)
    for number, day in enumerate(DAYS[2:], start=1):
        step = workspace(folder, day)
        cuts = cuts_of_retraining(step, champion)
        new = requests(sample_source(step, cuts.train, cuts.validation))
        trained.update(new)
        of_day = requests(sample_source(step, 0, FOREVER, (day,)))
        assert len([one for one in of_day if one in trained]) >= 0.9 * len(of_day)
        held_out = requests(sample_source(step, cuts.test, FOREVER))
        assert held_out == of_day[-len(held_out) :]
        assert trained.keys().isdisjoint(held_out)
        champion = version(tmp_path / str(number), trained_until=cuts.validation)
    everything = requests(sample_source(step, 0, FOREVER))
    assert Counter(everything[: len(everything) - len(held_out)]) == trained
    together = cuts_of_retraining(step, version(tmp_path / "far", trained_until=refitted))
    assert (together.train, together.test) == (refitted, cuts.test)


@pytest.mark.slow
def test_holdout_and_window_are_partitions_durations_or_shares(folder: Path) -> None:
    last = workspace(folder)
    opening = {day: last.log.bounds(day)[0] for day in DAYS}

    def cuts(window: str | None = None, **holdout: Any) -> Cuts:
        training = {"num_workers": 0} | ({"window": window} if window else {})
        return cuts_from_scratch(workspace(folder, holdout=holdout, training=training))

    assert cuts() == Cuts(opening[DAYS[0]], opening[DAYS[-2]], opening[DAYS[-1]])
    assert cuts(test="2 partitions", validation="36 hours") == Cuts(
        opening[DAYS[0]], opening[DAYS[-2]] - DAY * 3 // 2, opening[DAYS[-2]]
    )
    assert cuts("3 partitions").train == opening[DAYS[-5]]
    assert cuts("1 week", test="1 day").train == opening[DAYS[-2]] - 7 * DAY
    times = [ts for ts, _ in requests(sample_source(last, 0, FOREVER))]
    shares = cuts(test=0.1, validation="0.2")
    assert shares.test == times[len(times) - round(0.1 * len(times))]
    assert shares.validation == times[len(times) - round(0.1 * len(times)) - round(0.2 * len(times))]
    for holdout in ({"test": "11 partitions"}, {"validation": "2 weeks"}, {"test": "12 partitions"}):
        with pytest.raises(CorankError, match=r"too few for holdout.test .* would be left to train on"):
            cuts(**holdout)


@pytest.mark.slow
def test_a_champion_that_has_trained_on_everything_leaves_nothing_to_retrain_on(folder: Path, tmp_path: Path) -> None:
    last = workspace(folder)
    with pytest.raises(TooFewError, match=r"champion version 1 has not trained\s+on .*: too few"):
        cuts_of_retraining(last, version(tmp_path / "all", trained_until=last.log.bounds(DAYS[-1])[1]))
    old = version(tmp_path / "old", cuts={"train": 0, "validation": last.log.bounds(DAYS[-1])[0], "test": 1})
    assert cuts_of_retraining(last, old).train == last.log.bounds(DAYS[-1])[0]  # of an earlier version of the code


@pytest.mark.slow
def test_replay_mixes_in_the_share_of_older_requests_the_same_each_time(folder: Path) -> None:
    last = workspace(folder)
    opening = last.log.bounds(DAYS[-1])[0]
    source = sample_source(last, opening, FOREVER)
    new = requests(source)
    few = _replay(last, Cuts(opening, FOREVER, FOREVER))
    assert few is not None
    mixed = requests(replace(source, replay=few))
    assert mixed == requests(replace(source, replay=few))
    assert mixed[-len(new) :] == new
    older = mixed[: -len(new)]
    assert 0 < len(older) < 0.25 * len(new)
    every = requests(replace(source, replay=Replay(tuple(DAYS[:-1]), 1.0, 0)))
    assert every == requests(sample_source(last, 0, FOREVER))
    assert _replay(workspace(folder, retraining={"replay": 0}), Cuts(opening, FOREVER, FOREVER)) is None
    assert _replay(last, Cuts(0, FOREVER, FOREVER)) is None  # nothing is older


@pytest.mark.parametrize("text", ["", "0 partitions", "1.5", "0", "two days", "1 month", "-1 day", "1", "nan"])
def test_an_extent_that_is_not_written_as_one_is_a_mistake(text: str) -> None:
    with pytest.raises(ValueError, match="1 partition"):
        extent(text)
