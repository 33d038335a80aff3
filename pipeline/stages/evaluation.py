"""``evaluation``: the challenger is judged on the held-out newest requests, beside a baseline and the champion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from features.digest import digest
from features.errors import CorankError
from pipeline.config import Config
from pipeline.evaluation.settings import EvaluationConfig
from pipeline.records import LogRecord
from pipeline.runtime import ensure_ray
from pipeline.stages.challenger import CHALLENGER
from pipeline.stages.cuts import Cuts, trained_until
from pipeline.stages.samples import FOREVER, sample_source
from pipeline.stages.stage import Stage
from pipeline.workspace import Workspace

if TYPE_CHECKING:
    from pipeline.workspace.registry import ModelVersion


@dataclass(frozen=True)
class EvaluationRecord(LogRecord):
    """The verdict on a challenger.

    Attributes:
        model: version of the challenger's content.
        tasks: per task the metrics of challenger, baseline and champion, and gains
            (:meth:`pipeline.evaluation.comparison.TaskReport.as_dict`).
        impressions: that it was judged on.
        reasons: why it did not pass.
        champion: number of the version compared with, if any.
    """

    model: str = ""
    tasks: dict[str, Any] = field(default_factory=dict)
    impressions: int = 0
    passed: bool = False
    reasons: list[str] = field(default_factory=list)
    champion: int | None = None


class Evaluation(Stage[EvaluationRecord]):
    """The challenger's metrics on held-out requests, beside baseline and champion."""

    name = "evaluation"
    depends = ("challenger",)
    record = EvaluationRecord
    trains = True
    kinds = ("ray",)

    def key(self, workspace: Workspace) -> str:
        """Names the verdict on the challenger: other limits of the gate judge again without training again."""
        return digest([CHALLENGER.key(workspace), workspace.config.digest_of("evaluation")])

    def inputs(self, workspace: Workspace) -> dict[str, str]:
        key = self.key(workspace)
        return {key: key}

    def run(self, workspace: Workspace, parts: Sequence[str]) -> dict[str, EvaluationRecord]:
        """Judge the challenger on the held-out newest requests, beside the baseline and the champion.

        Raises:
            CorankError: of the gate's task there is no AUC, or a score is not finite.
        """
        import numpy as np

        from models.artifact import load_artifact
        from models.metrics import require_finite
        from pipeline.evaluation.baseline import baseline
        from pipeline.evaluation.comparison import compare
        from pipeline.evaluation.scoring import score_source

        (key,) = parts
        config = workspace.config
        challenger = workspace.records.require(CHALLENGER, CHALLENGER.key(workspace))
        cuts = challenger.cuts
        with workspace.progress.stage(self.name) as stage:
            stage.say("scoring held-out requests")
            ensure_ray(config.ray)
            test, options = sample_source(workspace, cuts.test, FOREVER), config.training
            budget = (4 * challenger.pace.batch_candidates, 4 * options.batch_events)
            scored = score_source(challenger.artifact, test, *budget)
            require_finite(f"scores of challenger {challenger.version}", scored.scores)
            champion = workspace.registry.champion()
            rival, since = None, cuts.test
            if champion is not None and challenger.version not in (
                champion.tags.get("content"),
                champion.tags.get("judged"),
            ):
                artifact, since = _comparable(champion, cuts)
                if load_artifact(artifact).schema != config.schema_:
                    workspace.progress.note(f"champion version {champion.number} reads other features: not compared")
                elif not (scored.ts >= since).any():
                    workspace.progress.note(
                        f"champion version {champion.number} has trained on the challenger's test set: not compared"
                    )
                else:
                    stage.say(f"scoring champion version {champion.number}")
                    rival = score_source(artifact, test, *budget)
                    if not np.isfinite(rival.scores).all():  # no reason to keep it
                        workspace.progress.note(f"champion version {champion.number} gives scores that are not finite")
                        rival = None
            stage.say("fitting the baseline")
            everything = sample_source(workspace, 0, FOREVER)
            baselines = {
                task.name: baseline(everything, task, cuts.test, config.log_delay) for task in config.schema_.tasks
            }
            reports = compare(config.schema_, scored, baselines, rival, since, config.evaluation.resamples)
            gate = reports[config.gate_task]
            if gate.gain is None:
                raise CorankError(
                    f"task {config.gate_task}, which the gate judges by: its labels in the test set, or those before "
                    "it for the baseline, have not both classes. Hold out more (`holdout.test`, "
                    "`retraining.holdout`), take more partitions, or name another task in `evaluation.task`"
                )
            against = (champion.number, gate.champion_gain.difference) if champion and gate.champion_gain else None
            reasons = gate_reasons(config.evaluation, gate.gain.difference, against)
            record = EvaluationRecord(
                inputs=key,
                model=challenger.version,
                tasks={name: entry.as_dict() for name, entry in reports.items()},
                impressions=len(scored.scores),
                passed=not reasons,
                reasons=reasons,
                champion=champion.number if rival is not None and champion else None,
                **workspace.lineage(),
            )
            workspace.records.write(self, key, record)
            stage.say(
                f"{len(scored.scores):,} impressions: {config.gate_task} AUC {gate.metrics.auc:.4f}, "
                f"{gate.gain.difference:+.4f} against the baseline (95 % {gate.gain.low:+.4f} … {gate.gain.high:+.4f})"
            )
        return {key: record}

    def rows(self, record: EvaluationRecord) -> int:
        return record.impressions

    def counts(self, workspace: Workspace) -> tuple[str, str] | None:
        record = workspace.records.read(self, self.key(workspace))
        return (f"{record.impressions:,} held-out candidates", "metrics below") if record is not None else None


EVALUATION = Evaluation()


def _comparable(champion: ModelVersion, cuts: Cuts) -> tuple[str, int]:
    """The artifact to compare with, and the ts from which on it has trained on nothing: that of the champion, or, where
    it was refitted on what the challenger is judged by, the one that was judged before."""
    until, lineage = trained_until(champion), champion.lineage()
    judged = lineage.get("judged", {}).get("artifact", "")
    if until > cuts.test and Path(judged, "SHA256SUMS").is_file():
        return judged, max(cuts.test, int(lineage["cuts"]["validation"]))
    return champion.artifact, max(cuts.test, until)


def gate_reasons(limits: EvaluationConfig, gain: float, against: tuple[int, float] | None) -> list[str]:
    """Why a challenger is not promoted; empty when it passes. A difference that is no number does not pass.

    Args:
        gain: AUC minus the baseline's.
        against: version of the champion and AUC minus its AUC, or None without one.
    """
    reasons = []
    if not gain >= limits.min_gain_over_baseline:
        reasons.append(f"AUC gain over the baseline {gain:+.4f} is below {limits.min_gain_over_baseline:+.4f}")
    if against is not None and not against[1] >= -limits.max_loss_against_champion:
        reasons.append(
            f"AUC {against[1]:+.4f} against champion version {against[0]} loses more than "
            f"{limits.max_loss_against_champion:.4f}"
        )
    return reasons


def report_path(config: Config, model: str) -> Path:
    """Where the report on a challenger lies (:mod:`pipeline.report`); written when its run has ended.

    Args:
        model: version of its content, as it was judged.
    """
    return config.local_path("reports", f"{model}.html")
