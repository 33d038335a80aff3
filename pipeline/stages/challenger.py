"""``challenger``: a model on trial is trained and published, not yet judged."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from features.digest import digest
from features.errors import CorankError
from pipeline.records import LogRecord
from pipeline.runtime import ensure_ray
from pipeline.stages.cuts import Cuts, cuts_from_scratch, cuts_of_retraining
from pipeline.stages.fitting import fit, optimizer_states, publish
from pipeline.stages.samples import FOREVER, SAMPLES, sample_source, trainable
from pipeline.stages.stage import Stage
from pipeline.stages.validated import require_validated
from pipeline.training.settings import Pace, TooFewError
from pipeline.workspace import Workspace, close_text

if TYPE_CHECKING:
    from torch import Tensor

    from features.samples.source import Replay
    from pipeline.workspace.registry import ModelVersion

MODEL_SECTIONS = ("features", "sequences", "tasks", "model", "training", "holdout")
"""Config sections that shape a training."""

REPLAYED_PARTITIONS = 4
"""Older partitions from which a retraining's replay is drawn; this limits what it reads."""


@dataclass(frozen=True)
class ChallengerRecord(LogRecord):
    """A trained model and its lineage.

    Attributes:
        artifact: directory of the published model.
        version: of its content.
        history: what was measured in every epoch.
        partitions: those whose samples it was made from, and what these were made from.
        trained_from, trained_until: ts of the requests that it was trained on, microseconds UTC.
        replay: older partitions out of which requests were mixed in, and the share of them.
        warm_start: number of the version it began with; None: from scratch.
        checkpoint: folder of the training's checkpoints.
    """

    artifact: str = ""
    version: str = ""
    history: list[dict[str, Any]] = field(default_factory=list)
    pipeline: str = ""
    partitions: dict[str, str] = field(default_factory=dict)
    cuts: Cuts = field(default_factory=lambda: Cuts(0, 0, 0))
    trained_from: int = 0
    trained_until: int = 0
    replay: dict[str, Any] = field(default_factory=dict)
    warm_start: int | None = None
    seed: int = 0
    pace: Pace = field(default_factory=lambda: Pace(0, 0, 0))
    checkpoint: str = ""


class Challenger(Stage[ChallengerRecord]):
    """A trained model, not yet judged."""

    name = "challenger"
    depends = ("feature_store", "progressive_validation")
    record = ChallengerRecord
    trains = True
    kinds = ("ray", "pytorch")

    def key(self, workspace: Workspace) -> str:
        """Names the challenger: the newest samples and everything that shapes training. The same for a run and a
        retraining, so that one finds the other's work done."""
        settings = [workspace.config.digest_of(*MODEL_SECTIONS), workspace.config.gate_task]
        # retired partitions too: dropping old samples makes no other challenger
        inputs = SAMPLES.inputs(workspace)
        known = [inputs[partition] for partition in workspace.partitions if workspace.log.is_attributed(partition)]
        return digest([known, settings, *(["from scratch"] if workspace.from_scratch else [])])

    def inputs(self, workspace: Workspace) -> dict[str, str]:
        key = self.key(workspace)
        return {key: key}

    def stale(self, workspace: Workspace) -> list[str]:
        """Also when files of its artifact are gone."""
        from models.artifact import is_complete

        key = self.key(workspace)
        record = workspace.records.read(self, key)
        return [] if record is not None and is_complete(record.artifact) else [key]

    def run(self, workspace: Workspace, parts: Sequence[str]) -> dict[str, ChallengerRecord]:
        """Train from scratch on the window, or from the champion on what it has not trained on.

        Raises:
            TooFewError: there is nothing to train on or to judge by.
            CorankError: training met what is not finite.
        """
        from pipeline.training.job import TrainingJob
        from pipeline.training.summary import require_both_classes, summarize

        require_validated(workspace)
        (key,) = parts
        config = workspace.config
        with workspace.progress.stage(self.name) as stage:
            stage.say("preparing")
            ensure_ray(config.ray)
            champion = workspace.registry.champion() if workspace.warm_start else None
            options = config.training
            if champion is None:
                weights, optimizers, replay = None, None, None
                cuts, remedy = cuts_from_scratch(workspace), "Widen `holdout.{}`"
            else:
                weights, checkpoint = _warm_start(workspace, champion)
                optimizers = optimizer_states(workspace, checkpoint)
                cuts, remedy = cuts_of_retraining(workspace, champion), "Widen `retraining.holdout`"
                replay = _replay(workspace, cuts)
                options = options.model_copy(update={"epochs": 1})  # every request is trained on once
            train_source = replace(
                sample_source(workspace, cuts.train, cuts.validation), replay=replay, negatives=options.negatives
            )
            test = sample_source(workspace, cuts.test, FOREVER)
            chosen_by = sample_source(workspace, cuts.validation, cuts.test) if cuts.validation < cuts.test else test
            require_both_classes(config.gate_task, "test", summarize(test), remedy.format("test"))
            if chosen_by is not test:
                where = "validation"
                require_both_classes(config.gate_task, where, summarize(chosen_by), remedy.format(where))
            summary = summarize(train_source)
            if not summary.candidates:
                raise TooFewError(
                    f"no requests to train on between {close_text(cuts.train)} and {close_text(cuts.validation)}; take "
                    "more partitions or hold out less (`holdout`)"
                )
            job = TrainingJob(
                name=f"{config.name}-{key[:12]}" + (f"-from-{champion.number}" if champion else ""),
                schema=config.schema_,
                model=config.model,
                training=options,
                pace=options.pace(summary.candidates),
                train=train_source,
                validation=chosen_by,
                statistics=summary.numbers if champion is None else {},
                gate_task=config.gate_task,
                warm_start=weights,
                optimizers=optimizers,
            )
            result = fit(workspace, stage, job)
            made_from = SAMPLES.inputs(workspace)
            lineage = {
                "pipeline": config.name,
                # those whose samples it was made from: retention keeps them while the model is live
                "partitions": {
                    partition: made_from[partition]
                    for partition in trainable(workspace)
                    if workspace.log.bounds(partition)[1] > cuts.train or (replay and partition in replay.partitions)
                },
                **workspace.lineage(),
                "cuts": asdict(cuts),
                "trained_from": cuts.train,
                "trained_until": cuts.validation,
                "replay": asdict(replay) if replay else {},
                "warm_start": champion.number if champion else None,
                "seed": options.seed,
                "pace": asdict(job.pace),
                "checkpoint": f"{config.path('checkpoints')}/{job.name}",
            }
            directory, version = publish(workspace, job.name, result, lineage, test)
            record = ChallengerRecord(
                inputs=key,
                artifact=str(directory),
                version=version,
                history=result.history,
                **{**lineage, "cuts": cuts, "pace": job.pace},
            )
            workspace.records.write(self, key, record)
            best = max(result.history, key=lambda entry: entry[f"{config.gate_task}_auc"] or 0.0)
            stage.say(
                f"model {version}, trained on requests of {close_text(cuts.train)} … {close_text(cuts.validation)}"
                + (f" from version {champion.number} on" if champion else "")
                + f", {len(result.history)} epochs of {best['candidates']:,} candidates, "
                f"best validation AUC {best[f'{config.gate_task}_auc']:.4f} in epoch {best['epoch']}"
            )
        return {key: record}

    def rows(self, record: ChallengerRecord) -> int:
        return sum(entry["candidates"] for entry in record.history)

    def counts(self, workspace: Workspace) -> tuple[str, str] | None:
        record = workspace.records.read(self, self.key(workspace))
        if record is None:
            return None
        return f"{record.history[-1]['candidates']:,} candidates", f"{len(record.history)} epochs"


CHALLENGER = Challenger()


def _warm_start(workspace: Workspace, champion: ModelVersion) -> tuple[Mapping[str, Tensor], str]:
    """The champion's weights, and where its training left its checkpoints.

    Raises:
        CorankError: its features or sizes differ from the config's.
    """
    from models.artifact import load_artifact
    from models.profile import on_meta

    config, artifact = workspace.config, load_artifact(champion.artifact)
    if artifact.schema != config.schema_:
        raise CorankError(
            f"retraining starts from model version {champion.number}, whose features differ from the "
            "config's; train from scratch with `corank retrain --full` or `corank run`"
        )
    declared = on_meta(config.schema_, config.model.name, config.model.preset, **config.model.overrides)
    same = [model.describe() | {"dropout": None} for model in (artifact.model, declared)]
    if same[0] != same[1]:
        raise CorankError(
            f"retraining starts from model version {champion.number}, whose model or sizes differ from "
            "the config's `model:`; train from scratch with `corank retrain --full` or `corank run`"
        )
    return artifact.model.state_dict(), str(artifact.metadata["lineage"]["checkpoint"])


def _replay(workspace: Workspace, cuts: Cuts) -> Replay | None:
    """Some older partitions, and the share of their requests that makes up the config's share of the new ones."""
    from features.samples.source import Replay

    options, log = workspace.config.retraining, workspace.log
    requests = {partition: workspace.records.require(SAMPLES, partition).requests for partition in trainable(workspace)}
    older = [partition for partition in requests if log.bounds(partition)[1] <= cuts.train and requests[partition]]
    new = sum(count for partition, count in requests.items() if log.bounds(partition)[0] >= cuts.train)
    if not options.replay or not older:
        return None
    draw = random.Random(f"{workspace.config.training.seed} {workspace.partitions[-1]}")
    drawn = sorted(draw.sample(older, min(REPLAYED_PARTITIONS, len(older))))
    share = options.replay * new / sum(requests[partition] for partition in drawn)
    return Replay(tuple(drawn), min(share, 1.0), draw.getrandbits(32))
