"""The gate on arrays: what passes, what fails, what is only told; segments and references against counting by hand."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from io import StringIO
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from deltalake import write_deltalake
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.metrics import roc_auc_score

from features.batch import RequestBatch
from features.samples.source import SampleSource
from models import RankingModel, build_model
from models.metrics import Gain
from pipeline.commands.summary import print_gate
from pipeline.evaluation.comparison import compare
from pipeline.evaluation.criterion import Criterion, cells, reasons
from pipeline.evaluation.gate import LATENCY_ROUNDS, Rival, at_least, judge, scoring_seconds
from pipeline.evaluation.impressions import EVENTS, IDENTITY, Impressions, read_impressions, segments
from pipeline.evaluation.references import references
from pipeline.evaluation.scoring import Scored
from pipeline.evaluation.settings import EvaluationConfig
from pipeline.progress import plain_console
from pipeline.records import Records
from pipeline.stages.evaluation import EVALUATION, EvaluationRecord
from tests.models.batches import make_rows, make_schema

SCHEMA = make_schema()
CUT = 1_300_000_000
LIMITS = EvaluationConfig(min_gain_over_baseline=-1.0, max_miscalibration=0.5, resamples=50, segment_impressions=300)


def scored_world(noise: float = 1.0, count: int = 4_000, seed: int = 0) -> Scored:
    """A test set whose scores are calibrated, but for noise that is the same in every call."""
    rng = np.random.default_rng(seed)
    logit = rng.normal(0, 1.5, (count, 2)) - 1
    labels = (rng.random((count, 2)) < 1 / (1 + np.exp(-logit))).astype(np.float32)
    user, item = rng.integers(0, 300, count), rng.integers(0, 50, count)
    scores = 1 / (1 + np.exp(-(logit + (noise - 1) * rng.normal(0, 1, (count, 2)))))
    return Scored(
        user_id=np.array([f"u{one}" for one in user], dtype=object),
        request_id=np.array([f"r{one}" for one in range(count)], dtype=object),
        item_id=np.array([str(one) for one in item], dtype=object),
        ts=np.arange(count),
        labels=labels,
        mask=np.ones((count, 2), bool),
        scores=scores.astype(np.float32),
    )


def judged(
    challenger: Scored,
    champion: Scored | None,
    segments: Mapping[str, np.ndarray] | None = None,
    limits: EvaluationConfig = LIMITS,
    since: int = 0,
) -> dict[str, Criterion]:
    """The verdict by what is measured; the baseline says nothing."""
    shown = pl.DataFrame({name: list(getattr(challenger, name)) for name in IDENTITY}).with_columns(score=pl.lit(0.5))
    baselines: dict[str, pl.DataFrame | None] = {task.name: shown for task in SCHEMA.tasks}
    reports = compare(SCHEMA, challenger, baselines, champion, since, limits.resamples, limits.level)
    rival = Rival("champion", champion, since) if champion else None
    found = judge(limits, SCHEMA, "task0", challenger, reports, rival, segments or {})
    assert len({one.measured for one in found}) == len(found)
    return {one.measured: one for one in found}


@pytest.mark.parametrize(
    ("low", "difference", "high", "auc", "gauc"),
    [
        (-0.009, -0.001, 0.007, True, True),  # all of the interval above −0.01: shown to be no worse
        (-0.012, -0.008, -0.004, False, False),  # narrow, so that an equal one would have passed
        (-0.050, -0.005, 0.040, True, None),  # too few to tell: the AUC is judged by itself
        (-0.050, -0.015, 0.020, False, None),
        (-0.060, -0.040, -0.011, False, False),  # all of it below
        (0.020, 0.050, 0.080, True, True),
    ],
)
def test_a_challenger_must_be_no_worse_than_its_margin_where_the_test_set_can_tell(
    low: float, difference: float, high: float, auc: bool | None, gauc: bool | None
) -> None:
    gain = Gain(difference, low, high)
    assert at_least("AUC", gain, -0.01, decides=True, width=0.01).passed is auc
    assert at_least("GAUC", gain, -0.01, width=0.01).passed is gauc


def test_what_is_no_number_never_passes() -> None:
    lost = Gain(np.nan, np.nan, np.nan)
    assert at_least("gain over the baseline", lost, 0.0).passed is False
    assert at_least("AUC", lost, -0.01, decides=True, width=0.01).passed is False


def test_an_equal_challenger_passes_everything_that_is_judged() -> None:
    world = scored_world()
    verdict = judged(world, world, {"new items": np.arange(4_000) % 2 == 0})
    assert reasons(list(verdict.values())) == []
    assert verdict["task0 AUC, gain over champion"].value == 0.0
    assert verdict["task0 AUC, new items, gain over champion"].passed is True
    assert verdict["task1 scores, PSI against champion"].value == 0.0
    assert verdict["task0 calibration (positives ÷ predicted)"].value == pytest.approx(1.0, abs=0.1)


def test_a_worse_challenger_fails_by_auc_gauc_and_entropy_of_every_task_with_its_reasons() -> None:
    worse, champion = scored_world(noise=4.0), scored_world()
    verdict = judged(worse, champion)
    failed = [name for name, one in verdict.items() if one.passed is False]
    for task in ("task0", "task1"):
        for measure in ("AUC, gain over", "GAUC, gain over", "normalised entropy, above"):
            assert f"{task} {measure} champion" in failed
    told = reasons(list(verdict.values()))
    auc = verdict["task0 AUC, gain over champion"]
    assert auc.interval is not None
    assert (
        f"task0 AUC, gain over champion: {auc.value:.4f} ({auc.interval[0]:.4f} … {auc.interval[1]:.4f}), "
        "must be ≥ -0.01" in told
    )
    expected = [roc_auc_score(champion.labels[:, 0], one.scores[:, 0]) for one in (worse, champion)]
    assert auc.value == pytest.approx(expected[0] - expected[1])
    lenient = LIMITS.model_copy(update={"max_loss_of_other_tasks": 1.0})
    assert judged(worse, champion, limits=lenient)["task1 AUC, gain over champion"].passed is True
    assert judged(worse, champion, limits=lenient)["task0 AUC, gain over champion"].passed is False


def test_only_requests_that_the_champion_has_not_trained_on_compare_the_two() -> None:
    worse, champion = scored_world(noise=4.0), scored_world()
    mixed = replace(worse, scores=np.where(np.arange(4_000)[:, None] < 2_000, worse.scores, champion.scores))
    assert judged(mixed, champion)["task0 AUC, gain over champion"].passed is False
    verdict = judged(mixed, champion, {"new users": np.arange(4_000) < 2_500}, since=2_000)
    assert reasons(list(verdict.values())) == []
    assert verdict["task0 AUC, new users, gain over champion"].note == "500 impressions"


def test_a_segment_fails_when_its_loss_is_beyond_chance_and_is_told_when_it_is_small_or_of_one_class() -> None:
    worse, champion = scored_world(noise=6.0), scored_world()
    part = np.arange(4_000) % 5 == 0
    mixed = replace(worse, scores=np.where(part[:, None], worse.scores, champion.scores))
    known = {
        "bad": part,
        "good": ~part,
        "small": part & (np.arange(4_000) < 900),
        "clicked": champion.labels[:, 0] > 0.5,
    }
    verdict = judged(mixed, champion, known)

    def passed(name: str) -> bool | None:
        return verdict[f"task0 AUC, {name}, gain over champion"].passed

    assert [passed(name) for name in known] == [False, True, None, None]
    assert verdict["task0 AUC, small, gain over champion"].note == "180 impressions"
    assert "not both classes" in verdict["task0 AUC, clicked, gain over champion"].note


def test_miscalibration_fails_unless_the_champion_is_further_off() -> None:
    champion = scored_world()
    low = replace(champion, scores=champion.scores / 2)
    name = "task0 calibration (positives ÷ predicted)"
    found = judged(low, champion)[name]
    assert found.passed is False
    assert found.value == pytest.approx(champion.labels[:, 0].sum() / low.scores[:, 0].sum(dtype=np.float64))
    assert found.limit_text == "0.67 … 1.50"
    assert judged(low, None)[name].passed is False
    assert judged(low, replace(champion, scores=champion.scores / 3))[name].passed is True
    assert judged(replace(champion, scores=np.sqrt(champion.scores)), None)[name].passed is False
    few = replace(low, mask=np.arange(4_000)[:, None] < np.array([30, 30]))
    assert judged(few, None)["task1 calibration (positives ÷ predicted)"].passed is not False


def test_scores_that_drift_from_the_champions_fail_without_one_it_is_told() -> None:
    champion = scored_world()
    moved = replace(champion, scores=champion.scores**2)  # the same ranking
    verdict = judged(moved, champion)
    assert verdict["task0 AUC, gain over champion"].passed is True
    assert verdict["task0 scores, PSI against champion"].passed is False
    towards = judged(champion, moved)["task0 scores, PSI against champion"]
    assert towards.value is not None
    assert towards.value > 0.5
    assert towards.passed is True
    assert towards.note == "towards the labels: the normalised entropy fell"
    alone = judged(moved, None)
    assert "task0 scores, PSI against champion" not in alone
    assert alone["comparison with the champion"] == Criterion(
        "comparison with the champion", note="there is no champion"
    )


class Watched(torch.nn.Module):
    """A model whose calls are noted, and take some time more."""

    def __init__(self, model: RankingModel, name: str, calls: list[str], seconds: float) -> None:
        super().__init__()
        self.model, self.schema, self.name, self.calls, self.seconds = model, model.schema, name, calls, seconds

    def forward(self, batch: RequestBatch) -> torch.Tensor:
        self.calls.append(self.name)
        until = time.thread_time() + self.seconds
        while time.thread_time() < until:
            pass
        scores: torch.Tensor = self.model(batch)
        return scores


def test_a_slow_challenger_fails_by_timings_that_alternate() -> None:
    model = build_model(SCHEMA, "ui-mixformer", "tiny", {"heads": 4, "head_dim": 8, "layers": 1}).eval()
    calls: list[str] = []
    slow, fast = Watched(model, "slow", calls, 0.1), Watched(model, "fast", calls, 0.0)
    seconds = scoring_seconds(slow, fast, make_rows(SCHEMA, 0))
    assert calls == ["slow", "fast"] * (1 + LATENCY_ROUNDS)
    assert seconds[0] > 0.1
    world = scored_world()
    shown = compare(SCHEMA, world, {"task0": None, "task1": None}, world, 0, 50)
    for own, other, passed in ((0.4, 0.1, False), (0.2, 0.1, True), (None, None, None)):
        rival = Rival("champion", world, 0, other, own)
        assert judge(LIMITS, SCHEMA, "task0", world, shown, rival, {})[-1].passed is passed


@pytest.mark.parametrize(("fine", "shown"), [(3, 3), (30, 0)])
def test_of_a_long_verdict_the_summary_shows_what_failed(tmp_path: Path, fine: int, shown: int) -> None:
    bad = Criterion("click AUC, device [a|b]", -0.5, (-0.6, -0.4), -0.03, "≥ -0.03", False, "612 impressions")
    criteria = [Criterion(f"fine {index}", 1.0, None, 0.0, "≥ 0", True) for index in range(fine)] + [bad]
    verdict = EvaluationRecord(criteria=criteria, passed=False, reasons=reasons(criteria))
    console = plain_console(width=200, file=StringIO(), record=True)
    print_gate(console, verdict)
    text = console.export_text()
    assert text.count("fine") == shown
    assert "click AUC, device [a|b]" in text
    assert f"failed: {fine} passed, 1 failed, 0 told" in text
    row = ("click AUC, device [a|b]", "-0.5000", "-0.6000 … -0.4000", "≥ -0.03", "failed", "612 impressions")
    assert cells(bad) == row
    records = Records(str(tmp_path))
    records.write(EVALUATION, "key", verdict)
    assert records.require(EVALUATION, "key").criteria == criteria


@pytest.fixture(scope="module")
def impressions(tmp_path_factory: pytest.TempPathFactory) -> Impressions:
    folder = tmp_path_factory.mktemp("impressions")
    write_deltalake(str(folder), make_rows(SCHEMA, 5, timelines=200), partition_by=["dt", "bucket"])
    source = SampleSource(str(folder), SCHEMA, ("d",), 0, 2**62)
    return read_impressions(source, CUT, rows=10_000, candidates=100)


def test_impressions_are_read_once_in_the_order_of_the_rows_and_drawn_before_the_test_set(
    impressions: Impressions, tmp_path: Path
) -> None:
    rows = make_rows(SCHEMA, 5, timelines=200).to_pylist()
    by_hand = [
        (row["user_id"], request["request_id"], candidate["item_id"], request["ts"], candidate["label__task0"])
        for row in rows
        for request in row["requests"]
        for candidate in request["candidates"]
    ]
    assert impressions.shown.select(*IDENTITY, "label__task0").rows() == by_hand
    assert impressions.test.select(*IDENTITY, "label__task0").rows() == [one for one in by_hand if one[3] >= CUT]
    assert impressions.before.height == sum(one[3] < CUT for one in by_hand)
    write_deltalake(str(tmp_path), make_rows(SCHEMA, 5, timelines=200), partition_by=["dt", "bucket"])
    source = SampleSource(str(tmp_path), SCHEMA, ("d",), 0, 2**62)
    drawn = read_impressions(source, CUT, rows=100, candidates=len(by_hand)).before
    assert 0 < drawn.height < 0.5 * impressions.before.height


def test_segments_are_those_counted_by_hand(impressions: Impressions) -> None:
    found = segments(impressions, SCHEMA, CUT)
    rows = make_rows(SCHEMA, 5, timelines=200).to_pylist()
    shown = [
        (request, candidate)
        for row in rows
        for request in row["requests"]
        for candidate in request["candidates"]
        if request["ts"] >= CUT
    ]
    events = np.array([min(request["end__seen"], 4) + min(request["end__bought"], 2) for request, _ in shown])
    assert impressions.test.select(
        pl.sum_horizontal(f"{EVENTS} of seen", f"{EVENTS} of bought")
    ).to_series().to_list() == (events.tolist())
    assert found["new users"].tolist() == (events == 0).tolist()
    activity = [
        found[f"users with {which} events"]
        for which in ("few", "some", "many")
        if f"users with {which} events" in found
    ]
    assert (sum(part.astype(int) for part in (*activity, found["new users"])) == 1).all()
    assert found["device a"].tolist() == [request["feature__device"] == 1 for request, _ in shown]
    assert found["device unknown"].tolist() == [request["feature__device"] == 0 for request, _ in shown]
    assert found["tags y"].tolist() == [2 in candidate["feature__tags"] for _, candidate in shown]
    known = replace(impressions, shown=impressions.shown.filter((pl.col("ts") >= CUT) | (pl.col("item_id") != "0")))
    new = segments(known, SCHEMA, CUT)["new items"]
    assert new.tolist() == [candidate["item_id"] == "0" for _, candidate in shown]


def test_references_are_the_best_number_before_the_test_set_and_boosting_on_all(impressions: Impressions) -> None:
    events = f"{EVENTS} of seen"
    before = impressions.before.with_columns(label__task0=(pl.col(events) < 2).cast(pl.Int8))
    found = references(replace(impressions, before=before), SCHEMA, SCHEMA.tasks[0])
    columns = ["feature__age", events, f"{EVENTS} of bought"]
    fitted, test = (frame.select(pl.col(columns).cast(pl.Float64)).to_numpy() for frame in (before, impressions.test))
    booster = HistGradientBoostingClassifier(random_state=0).fit(fitted, before["label__task0"].to_numpy())
    assert list(found) == [f"{events} alone", "boosting on 3 numbers"]
    assert found["boosting on 3 numbers"].tolist() == booster.predict_proba(test)[:, 1].tolist()
    assert found[f"{events} alone"].tolist() == (-impressions.test[events]).to_list()  # fewer is better
    assert references(replace(impressions, before=before.filter(label__task0=1)), SCHEMA, SCHEMA.tasks[0]) == {}


def test_references_are_told_and_judge_only_when_configured() -> None:
    world = scored_world()
    strong = {"task0": {"truth": world.labels[:, 0].astype(np.float64)}}
    reports = compare(SCHEMA, world, {"task0": None, "task1": None}, None, 0, 50, references=strong)
    assert reports["task0"].as_dict()["references"]["truth"]["auc"] == 1.0
    judging = LIMITS.model_copy(update={"min_gain_over_references": 0.0})
    for limits, passed in ((LIMITS, None), (judging, False)):
        (found,) = [
            one
            for one in judge(limits, SCHEMA, "task0", world, reports, None, {})
            if one.measured == "task0 AUC, gain over truth"
        ]
        assert found.passed is passed
        assert found.value == pytest.approx(roc_auc_score(world.labels[:, 0], world.scores[:, 0]) - 1)
