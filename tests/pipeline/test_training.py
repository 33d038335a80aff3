"""Training on what is not finite, on damaged checkpoints and on labels that are missing; and what follows the data."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
import torch
from deltalake import write_deltalake

import pipeline.progress
from features.errors import CorankError
from features.samples.source import SampleSource
from features.schema import Feature
from models.config import ModelConfig
from models.selfcheck import require_selfcheck, selfcheck_difference
from pipeline.commands.summary import few_steps
from pipeline.deployment.selfcheck import selfcheck_document
from pipeline.deployment.verification import raw_contexts
from pipeline.evaluation.baseline import baseline
from pipeline.evaluation.comparison import compare
from pipeline.evaluation.impressions import read_impressions
from pipeline.evaluation.scoring import Scored
from pipeline.evaluation.texts import classes_text, gain_text
from pipeline.progress import Eta
from pipeline.training.checkpoints import Checkpoints
from pipeline.training.job import TrainingJob, initial_model
from pipeline.training.settings import TrainingConfig
from pipeline.training.summary import require_both_classes, summarize
from pipeline.training.training import train
from tests.models.batches import make_rows, make_schema

SCHEMA = make_schema()
FOREVER = 2**62


def source_of(folder: Path, rows: pa.Table) -> SampleSource:
    write_deltalake(str(folder), rows, partition_by=["dt", "bucket"])
    return SampleSource(str(folder), SCHEMA, ("d",), 0, FOREVER)


def with_candidates(rows: pa.Table, change: Any) -> pa.Table:
    """The rows after ``change(request_id, candidate)`` of every candidate."""
    listed = rows.to_pylist()
    for row in listed:
        for request in row["requests"]:
            for candidate in request["candidates"]:
                change(request["request_id"], candidate)
    return pa.Table.from_pylist(listed, schema=rows.schema)


def job_of(source: SampleSource, **training: Any) -> TrainingJob:
    options = TrainingConfig(
        **{"epochs": 3, "batch_candidates": 60, "cpus_per_worker": 0.5, "num_workers": 0} | training
    )
    return TrainingJob(
        name="job",
        schema=SCHEMA,
        model=ModelConfig(name="ui-mixformer", preset="tiny", heads=4, head_dim=8, layers=1),  # type: ignore[call-arg]
        training=options,
        pace=options.pace(400),
        train=source,
        validation=source,
        statistics={},
        gate_task="task0",
    )


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_one_weight_that_is_no_number_stops_every_worker_and_is_named(tmp_path: Path, local_ray: None) -> None:
    def poison(request_id: str, candidate: dict[str, Any]) -> None:
        if request_id == "u33-0":
            candidate |= {"weight": np.nan, "label__task0": 1}

    rows = make_rows(SCHEMA, 1, timelines=40)
    bad = job_of(source_of(tmp_path / "bad", with_candidates(rows, poison)), num_workers=2, epochs=1)
    message = r"epoch 1, step \d+: \d values of the column weight are not finite, .* in request u33-0 of user u33"
    with pytest.raises(CorankError, match=message):
        train(bad, str(tmp_path / "checkpoints"), lambda _: None)
    mended = replace(bad, name="mended", train=source_of(tmp_path / "good", rows))
    result = train(mended, str(tmp_path / "checkpoints"), lambda _: None)
    assert all(one.isfinite().all() for one in result.model.parameters())


def test_weights_that_are_not_finite_are_named(tmp_path: Path) -> None:
    job = job_of(source_of(tmp_path / "samples", make_rows(SCHEMA, 1, timelines=40)))
    start = initial_model(job).state_dict()
    start["towers.out_bias"][0] = torch.nan
    with pytest.raises(CorankError, match=r"epoch 1, step 1: the weights are not finite \(towers.out_bias"):
        train(replace(job, warm_start=start), str(tmp_path / "checkpoints"), lambda _: None)


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_damaged_checkpoint_is_said_and_not_used_and_the_model_is_the_same(tmp_path: Path, local_ray: None) -> None:
    """Trained by Ray Train, then again in this process, which changes no bit."""
    job = job_of(source_of(tmp_path / "samples", make_rows(SCHEMA, 1, timelines=40)))
    storage, said = tmp_path / "checkpoints", []
    by_ray = replace(job, training=job.training.model_copy(update={"num_workers": 1}))
    undisturbed = train(by_ray, str(storage), lambda _: None)
    states = [storage / "job" / name / "state.pt" for name in ("epoch-0002", "epoch-0003")]
    assert sorted(storage.glob("job/*/state.pt")) == states
    for damaged in (states[1:], states):
        for path in damaged:
            flip_a_bit(path)
        said.clear()
        again = train(job, str(storage), said.append)
        notes = [one["note"] for one in said if "note" in one]
        assert [str(path.parent) in note for path, note in zip(reversed(damaged), notes, strict=False)] == [True] * len(
            damaged
        )
        assert ("no checkpoint is whole: training starts anew" in notes) == (damaged == states)
        assert again.history == undisturbed.history
        for name, value in again.model.state_dict().items():
            assert torch.equal(value, undisturbed.model.state_dict()[name]), name


def test_the_newest_whole_checkpoint_counts_and_two_are_kept(tmp_path: Path) -> None:
    checkpoints, said = Checkpoints(str(tmp_path / "job")), []
    assert checkpoints.newest(said.append) == 0
    for epoch in (1, 2, 3):
        checkpoints.save(epoch, {"epoch": epoch, "model": torch.arange(100.0)})
    assert [one.name for one in sorted((tmp_path / "job").iterdir())] == ["epoch-0002", "epoch-0003"]
    assert (checkpoints.newest(said.append), said) == (3, [])
    assert checkpoints.load(3)["epoch"] == 3
    (tmp_path / "job/epoch-0003/SHA256SUMS").unlink()  # killed before it was written
    assert checkpoints.newest(said.append) == 2
    assert "epoch-0003 is damaged or was not finished" in said[0]
    with pytest.raises(CorankError, match="epoch-0003 is damaged"):
        checkpoints.load(3)
    flip_a_bit(tmp_path / "job/epoch-0002/SHA256SUMS")
    assert checkpoints.newest(said.append) == 0
    assert said[-1] == "no checkpoint is whole: training starts anew"


@pytest.mark.slow
def test_a_gate_without_both_classes_is_told_before_training(tmp_path: Path, local_ray: None) -> None:
    def only_ones(request_id: str, candidate: dict[str, Any]) -> None:
        candidate["label__task0"] = candidate["label__task0"] and 1
        candidate["label__task1"] = candidate["label__task1"] or None

    summary = summarize(source_of(tmp_path, with_candidates(make_rows(SCHEMA, 2, timelines=9), only_ones)))
    known, positive = summary.labels["task0"]
    assert 0 < positive < known < summary.candidates
    require_both_classes("task0", "test", summary, "Widen `holdout.test`")
    known, positive = summary.labels["task1"]
    assert 0 < positive == known
    message = f"task1.* of {summary.candidates} candidates in the test set {known} have a known label, {known} of them"
    with pytest.raises(CorankError, match=message):
        require_both_classes("task1", "test", summary, "Widen `holdout.test`")


@pytest.mark.parametrize("label", [None, 1])
def test_a_second_task_without_labels_or_of_one_class_has_no_metrics_and_stops_nothing(
    tmp_path: Path, label: int | None
) -> None:
    def as_one(request_id: str, candidate: dict[str, Any]) -> None:
        candidate["label__task1"] = label

    source = source_of(tmp_path / "samples", with_candidates(make_rows(SCHEMA, 3, timelines=30), as_one))
    impressions = read_impressions(source, 1_300_000_000, rows=50, candidates=100)
    baselines = {task.name: baseline(impressions.shown, task, 1_300_000_000, 0) for task in SCHEMA.tasks}
    shown = baselines["task0"]
    assert shown is not None
    assert baselines["task1"] is None
    count = shown.height
    scored = Scored(
        user_id=shown["user_id"].to_numpy(),
        request_id=shown["request_id"].to_numpy(),
        item_id=shown["item_id"].to_numpy(),
        ts=shown["ts"].to_numpy(),
        labels=np.stack([shown["label"].to_numpy(), np.full(count, label or 0)], 1),
        mask=np.stack([np.ones(count, bool), np.full(count, label is not None)], 1),
        scores=np.random.default_rng(0).random((count, 2)),
    )
    entries = {name: one.as_dict() for name, one in compare(SCHEMA, scored, baselines, scored, 0, 50).items()}
    json.dumps(entries, allow_nan=False)
    told = [gain_text(entries[name]["auc_gain_over_baseline"]) for name in ("task0", "task1")]
    assert float(told[0]) == round(entries["task0"]["auc_gain_over_baseline"]["difference"], 4)
    assert told[1] == "–"
    unknown = ("auc", "uauc", "gauc", "query_auc", "baseline", "auc_gain_over_baseline", "auc_gain_over_champion")
    assert [entries["task1"][name] for name in unknown] == [None] * len(unknown)
    assert entries["task1"]["impressions"] == (0 if label is None else count)
    assert (classes_text(entries["task1"]) == "no label is known") == (label is None)
    assert sum(one["impressions"] for one in entries["task1"]["calibration"]) == (0 if label is None else count)


def test_a_model_that_scores_no_numbers_is_never_verified(tmp_path: Path) -> None:
    source = source_of(tmp_path / "samples", make_rows(SCHEMA, 1, timelines=8))
    model = initial_model(job_of(source)).eval()
    document = selfcheck_document(model, source)
    assert selfcheck_difference(model, document) == 0.0
    with torch.no_grad():
        model.inputs.tables["user_id"].weight[3] = torch.nan  # type: ignore[union-attr,index]
    assert np.isnan(selfcheck_difference(model, document))
    with pytest.raises(CorankError, match=r"scores of the self-check requests are not finite"):
        selfcheck_document(model, source)
    with pytest.raises(CorankError, match="model lost: its self-check requests differ by nan"):
        require_selfcheck("lost", model, document)


def test_a_context_is_sent_as_the_log_is_read() -> None:
    features = (Feature(name="x", side="context", kind="number"), Feature(name="again", column="x", side="context"))
    schema = SCHEMA.model_copy(update={"features": features})
    values = [1.5, float("nan"), float("-inf"), 1e300, None]
    rows = pl.DataFrame({"request_id": list("abcde"), "item_id": ["i"] * 5, "x": values})
    contexts = raw_contexts(schema, rows)
    assert [contexts[one]["x"] for one in "abcde"] == [1.5, None, None, None, None]
    json.dumps(contexts, allow_nan=False)


@pytest.mark.parametrize(
    ("candidates", "epochs", "pace"),
    [
        (80_000, 5, (1_500, 50)),  # MovieLens-100K, as it was tuned
        (10**9, 1, (1_500, 50)),
        (20_000, 6, (500, 48)),
        (2_000, 6, (100, 24)),
        (10, 1, (100, 0)),
    ],
)
def test_batches_and_warm_up_follow_the_data(candidates: int, epochs: int, pace: tuple[int, int]) -> None:
    found = TrainingConfig(epochs=epochs).pace(candidates)
    assert (found.batch_candidates, found.warmup_steps) == pace
    chosen = TrainingConfig(epochs=epochs, batch_candidates=7, warmup_steps=0).pace(candidates)
    assert (chosen.batch_candidates, chosen.warmup_steps) == (7, 0)


def test_a_training_of_few_steps_is_told_so() -> None:
    assert few_steps([{"steps": 30}, {"steps": 30}]).startswith("the training had 60 steps only")
    assert few_steps([{"steps": 50}, {"steps": 50}]) == ""


def test_the_rate_is_smoothed_and_tells_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter([10.0, 11.0, 12.0, 13.0])
    monkeypatch.setattr(pipeline.progress.time, "monotonic", lambda: next(moments))
    eta = Eta()
    assert eta.tell(500, 10_000, "candidates") == ""  # how long it took to start says nothing
    assert eta.tell(1_500, 10_000, "candidates") == ", 1,000 candidates/s, 0:08 left"
    assert eta.tell(3_000, 10_000, "candidates") == ", 1,100 candidates/s, 0:06 left"
    assert eta.tell(10_000, 10_000, "candidates").endswith("candidates/s")


def test_a_warm_start_goes_on_from_what_the_optimizers_knew(tmp_path: Path) -> None:
    source = source_of(tmp_path / "samples", make_rows(SCHEMA, 1, timelines=30))
    first = job_of(source, epochs=1, average=0.0)
    train(first, str(tmp_path), lambda _: None)
    known = Checkpoints(str(tmp_path / first.name)).load(1)
    # from its weights before averaging; another seed draws other rows
    second = replace(first, name="second", training=first.training.model_copy(update={"seed": 3}))
    results, sums = {}, {}
    for name, states in (("kept", known["optimizers"]), ("anew", None)):
        job = replace(second, name=name, warm_start=known["model"], optimizers=states)
        results[name] = train(job, str(tmp_path), lambda _: None).model.state_dict()
        dense, tables = Checkpoints(str(tmp_path / name)).load(1)["optimizers"]
        assert int(dense["state"][0]["step"]) == known["step"] * (2 if states else 1)
        sums[name] = tables["state"][0]["sum"]
    before = known["optimizers"][1]["state"][0]["sum"]
    assert (sums["kept"] >= before).all()
    assert not (sums["anew"] >= before).all()
    assert any(not torch.equal(results["kept"][name], results["anew"][name]) for name in results["kept"])
