"""``refit``: a model from scratch that passed its gate is trained on what it was judged on, before it goes live."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from features.digest import digest
from pipeline.records import LogRecord
from pipeline.runtime import ensure_ray
from pipeline.stages.challenger import CHALLENGER, ChallengerRecord
from pipeline.stages.evaluation import EVALUATION, EvaluationRecord
from pipeline.stages.fitting import fit, optimizer_states, publish
from pipeline.stages.samples import FOREVER, sample_source, trainable
from pipeline.stages.stage import Stage
from pipeline.workspace import Workspace, close_text


@dataclass(frozen=True)
class RefitRecord(LogRecord):
    """Which model is registered: the judged one, or the one trained further on the held-out requests.

    Attributes:
        artifact: directory of the published model.
        version: of its content.
        judged: version of the judged model's content.
        refitted: whether the two differ.
        why: in words, for the user.
        trained_until: ts up to which it has trained on every request, microseconds UTC.
        predictions: per task the mean prediction on the held-out requests, judged and refitted.
    """

    artifact: str = ""
    version: str = ""
    judged: str = ""
    refitted: bool = False
    why: str = ""
    trained_until: int = 0
    predictions: dict[str, tuple[float | None, float | None]] = field(default_factory=dict)


def refit_key(evaluation: str) -> str:
    """Key of the refit's record for a verdict, made from the verdict's key."""
    return digest(["refit", evaluation])


class Refit(Stage[RefitRecord]):
    """The challenger that passed, trained on what was held out."""

    name = "refit"
    depends = ("evaluation",)
    record = RefitRecord
    trains = True
    kinds = ("ray", "pytorch")

    def key(self, workspace: Workspace) -> str:
        return refit_key(EVALUATION.key(workspace))

    def inputs(self, workspace: Workspace) -> dict[str, str]:
        key = self.key(workspace)
        return {key: key}

    def stale(self, workspace: Workspace) -> list[str]:
        """Also when files of its artifact are gone."""
        from models.artifact import is_complete

        key = self.key(workspace)
        record = workspace.records.read(self, key)
        return [] if record is not None and is_complete(record.artifact) else [key]

    def run(self, workspace: Workspace, parts: Sequence[str]) -> dict[str, RefitRecord]:
        """Train the judged model on validation and test set, once; keep it if it predicts alike.

        Raises:
            CorankError: training met what is not finite.
        """
        (key,) = parts
        challenger = workspace.records.require(CHALLENGER, CHALLENGER.key(workspace))
        evaluation = workspace.records.require(EVALUATION, EVALUATION.key(workspace))
        kept = RefitRecord(
            inputs=key,
            artifact=challenger.artifact,
            version=challenger.version,
            judged=challenger.version,
            trained_until=challenger.trained_until,
            **workspace.lineage(),
        )
        if why := _why_not(workspace, challenger, evaluation):
            record = replace(kept, why=why)
        else:
            with workspace.progress.stage(self.name) as stage:
                record = _refitted(workspace, stage, kept, challenger)
                stage.say(record.why)
        workspace.records.write(self, key, record)
        return {key: record}


REFIT = Refit()


def _why_not(workspace: Workspace, challenger: ChallengerRecord, evaluation: EvaluationRecord) -> str:
    """Why the judged model itself is registered; empty when it is refitted."""
    if not evaluation.passed:
        return "not refitted: it did not pass its gate"
    if challenger.warm_start is not None:
        return "not refitted: the next retraining trains on what was held out"
    return "" if workspace.config.evaluation.refit else "not refitted: evaluation.refit is off"


def _refitted(workspace: Workspace, line: Any, kept: RefitRecord, challenger: ChallengerRecord) -> RefitRecord:
    from models.artifact import load_artifact
    from pipeline.evaluation.scoring import score_source, scored_metrics
    from pipeline.training.job import TrainingJob
    from pipeline.training.summary import summarize

    config, cuts = workspace.config, challenger.cuts
    line.say("preparing")
    ensure_ray(config.ray)
    artifact = load_artifact(challenger.artifact)
    held_out, test = (sample_source(workspace, low, FOREVER) for low in (cuts.validation, cuts.test))
    held_out = replace(held_out, negatives=config.training.negatives)
    summary = summarize(held_out)
    job = TrainingJob(
        name=f"{Path(challenger.artifact).name}-refit",
        schema=config.schema_,
        model=config.model,
        training=config.training.model_copy(update={"epochs": 1}),
        # the batch size of before, and no warm-up, as the learning rates need not rise again
        pace=replace(challenger.pace, candidates=summary.candidates, warmup_steps=0),
        train=held_out,
        validation=None,
        statistics={},
        gate_task=config.gate_task,
        warm_start=artifact.model.state_dict(),
        optimizers=optimizer_states(workspace, challenger.checkpoint),
    )
    result = fit(workspace, line, job)
    until = workspace.log.bounds(trainable(workspace)[-1])[1]
    lineage = {
        **artifact.metadata["lineage"],
        "judged": {"artifact": challenger.artifact, "version": challenger.version, "from": cuts.test, "until": until},
        "refitted_on": {"from": cuts.validation, "until": until},
        "trained_until": until,
        "checkpoint": f"{config.path('checkpoints')}/{job.name}",
    }
    directory, version = publish(workspace, job.name, result, lineage, test)
    line.say("comparing its predictions with those of the judged model")
    means = [
        {task: entry["predicted"] for task, entry in scored_metrics(config.schema_, score_source(path, test)).items()}
        for path in (challenger.artifact, str(directory))
    ]
    predictions = {task: (means[0][task], means[1][task]) for task in means[0]}
    bound = config.evaluation.refit_bound
    for task, (judged, refitted) in predictions.items():
        if judged is not None and refitted is not None and not abs(refitted - judged) <= bound * judged:
            why = (
                f"not refitted: trained on the held-out requests too, the mean prediction of {task} on them moved from "
                f"{judged:.4f} to {refitted:.4f}, more than evaluation.refit_bound {bound:g}"
            )
            return replace(kept, why=why, predictions=predictions)
    return replace(
        kept,
        artifact=str(directory),
        version=version,
        refitted=True,
        trained_until=until,
        predictions=predictions,
        why=f"model {version}: {challenger.version}, trained on the {summary.candidates:,} held-out candidates of "
        f"{close_text(cuts.validation)} … {close_text(until)} too",
    )
