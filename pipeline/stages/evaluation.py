"""``evaluation``: the challenger is judged on the held-out newest requests, beside a baseline and the champion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from features.digest import digest
from features.errors import CorankError
from pipeline.config import Config
from pipeline.evaluation.criterion import Criterion, counts_text, reasons
from pipeline.records import LogRecord
from pipeline.runtime import ensure_ray
from pipeline.stages.challenger import CHALLENGER, ChallengerRecord
from pipeline.stages.cuts import Cuts, trained_until
from pipeline.stages.samples import FOREVER, SAMPLES, sample_source, trainable
from pipeline.stages.stage import Stage
from pipeline.workspace import Workspace

if TYPE_CHECKING:
    from features.samples.source import SampleSource
    from pipeline.evaluation.gate import Rival
    from pipeline.evaluation.scoring import Scored
    from pipeline.workspace.registry import ModelVersion


@dataclass(frozen=True)
class EvaluationRecord(LogRecord):
    """The verdict on a challenger.

    Attributes:
        model: version of the challenger's content.
        tasks: per task the metrics of challenger, baseline, references and champion, and gains
            (:meth:`pipeline.evaluation.comparison.TaskReport.as_dict`).
        impressions: number of those that it was judged on.
        criteria: of the gate; it passed when none of them failed.
        reasons: why it did not pass.
        champion: number of the version compared with, if any.
    """

    model: str = ""
    tasks: dict[str, Any] = field(default_factory=dict)
    impressions: int = 0
    passed: bool = False
    criteria: list[Criterion] = field(default_factory=list)
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
        from models.metrics import require_finite
        from pipeline.evaluation.baseline import baseline
        from pipeline.evaluation.comparison import compare
        from pipeline.evaluation.gate import judge
        from pipeline.evaluation.impressions import read_impressions, segments
        from pipeline.evaluation.references import references
        from pipeline.evaluation.scoring import score_source

        (key,) = parts
        config, limits = workspace.config, workspace.config.evaluation
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
            if champion is not None:
                stage.say(f"scoring champion version {champion.number}")
            rival, without = _rival(workspace, champion, challenger, scored, test, budget)
            if champion is not None and rival is None:
                workspace.progress.note(f"not compared with champion version {champion.number}: {without}")
            stage.say("fitting the baseline and stronger references")
            everything = sample_source(workspace, 0, FOREVER)
            candidates = sum(
                workspace.records.require(SAMPLES, partition).candidates for partition in trainable(workspace)
            )
            impressions = read_impressions(everything, cuts.test, limits.reference_rows, candidates)
            assert (impressions.test["item_id"].to_numpy() == scored.item_id).all()
            tasks = config.schema_.tasks
            reports = compare(
                config.schema_,
                scored,
                {task.name: baseline(impressions.shown, task, cuts.test, config.log_delay) for task in tasks},
                rival.scored if rival else None,
                rival.since if rival else cuts.test,
                limits.resamples,
                limits.level,
                {task.name: references(impressions, config.schema_, task) for task in tasks},
            )
            gate = reports[config.gate_task]
            if gate.gain is None:
                raise CorankError(
                    f"task {config.gate_task}, which the gate judges by: its labels in the test set, or those before "
                    "it for the baseline, have not both classes. Hold out more (`holdout.test`, "
                    "`retraining.holdout`), take more partitions, or name another task in `evaluation.task`"
                )
            stage.say("judging")
            parts_of_test = segments(impressions, config.schema_, cuts.test)
            criteria = judge(limits, config.schema_, config.gate_task, scored, reports, rival, parts_of_test, without)
            record = EvaluationRecord(
                inputs=key,
                model=challenger.version,
                tasks={name: entry.as_dict() for name, entry in reports.items()},
                impressions=len(scored.scores),
                passed=not reasons(criteria),
                criteria=criteria,
                reasons=reasons(criteria),
                champion=champion.number if rival is not None and champion else None,
                **workspace.lineage(),
            )
            workspace.records.write(self, key, record)
            stage.say(
                f"{len(scored.scores):,} impressions: {config.gate_task} AUC {gate.metrics.auc:.4f}, "
                f"{gate.gain.difference:+.4f} against the baseline "
                f"({limits.level:.0%} {gate.gain.low:+.4f} … {gate.gain.high:+.4f}); {counts_text(criteria)}"
            )
        return {key: record}

    def rows(self, record: EvaluationRecord) -> int:
        return record.impressions

    def counts(self, workspace: Workspace) -> tuple[str, str] | None:
        record = workspace.records.read(self, self.key(workspace))
        return (f"{record.impressions:,} held-out candidates", "metrics below") if record is not None else None


EVALUATION = Evaluation()


def _rival(
    workspace: Workspace,
    champion: ModelVersion | None,
    challenger: ChallengerRecord,
    scored: Scored,
    test: SampleSource,
    budget: tuple[int, int],
) -> tuple[Rival | None, str]:
    """The champion on the challenger's test set; or None, and why it is not compared."""
    import numpy as np

    from models.artifact import load_artifact
    from models.selfcheck import selfcheck_rows
    from pipeline.evaluation.gate import Rival, scoring_seconds
    from pipeline.evaluation.scoring import score_source

    if champion is None:
        return None, "there is no champion"
    if challenger.version in (champion.tags.get("content"), champion.tags.get("judged")):
        return None, "it is the challenger itself"
    path, since = _comparable(champion, challenger.cuts)
    artifact, schema = load_artifact(path), workspace.config.schema_
    if artifact.schema != schema:
        return None, "it reads other features"
    if not (scored.ts >= since).any():
        return None, "it has trained on the challenger's test set"
    found = score_source(path, test, *budget)
    if not np.isfinite(found.scores).all():  # such a champion is no reason to refuse a challenger
        return None, "it gives scores that are not finite"
    judged = load_artifact(challenger.artifact)
    rows = selfcheck_rows(schema, judged.metadata["selfcheck"])
    seconds = scoring_seconds(judged.model, artifact.model, rows) if rows.num_rows else (None, None)
    return Rival(f"champion version {champion.number}", found, since, own_seconds=seconds[0], seconds=seconds[1]), ""


def _comparable(champion: ModelVersion, cuts: Cuts) -> tuple[str, int]:
    """The artifact to compare with, and the ts from which on it has not trained. It is the champion's; where that was
    refitted on requests that the challenger is judged by, it is the one judged before the refit."""
    until, lineage = trained_until(champion), champion.lineage()
    judged = lineage.get("judged", {}).get("artifact", "")
    if until > cuts.test and Path(judged, "SHA256SUMS").is_file():
        return judged, max(cuts.test, int(lineage["cuts"]["validation"]))
    return champion.artifact, max(cuts.test, until)


def report_path(config: Config, model: str) -> Path:
    """Where the report on a challenger lies (:mod:`pipeline.report`); written when its run has ended.

    Args:
        model: version of its content, as it was judged.
    """
    return config.local_path("reports", f"{model}.html")
