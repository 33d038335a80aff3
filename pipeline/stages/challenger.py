"""``challenger``: a model on trial is trained and published, not yet judged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from features.digest import digest
from features.errors import CorankError
from pipeline.progress import Eta
from pipeline.records import LogRecord
from pipeline.runtime import ensure_ray
from pipeline.stages.samples import FOREVER, SAMPLES, sample_source, trainable
from pipeline.stages.stage import Stage
from pipeline.stages.validated import require_validated
from pipeline.training.settings import Pace
from pipeline.workspace import Workspace, close_text

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.workspace.registry import ModelVersion

MODEL_SECTIONS = ("features", "sequences", "tasks", "model", "training", "split")
"""Config sections that shape a training."""


@dataclass(frozen=True)
class Cuts:
    """Chronological split by request ts: train < validation ≤ … < test ≤ …, microseconds UTC."""

    train: int
    validation: int
    test: int


@dataclass(frozen=True)
class ChallengerRecord(LogRecord):
    """A trained model and its lineage.

    Attributes:
        artifact: directory of the published model.
        version: of its content.
        history: what was measured in every epoch.
        partitions: those whose samples it was made from, and what these were made from.
        trained_from: ts of the first request that it was trained on, microseconds UTC.
        warm_start: number of the version it began with.
        checkpoint: folder of the training's checkpoints.
    """

    artifact: str = ""
    version: str = ""
    history: list[dict[str, Any]] = field(default_factory=list)
    pipeline: str = ""
    partitions: dict[str, str] = field(default_factory=dict)
    cuts: Cuts = field(default_factory=lambda: Cuts(0, 0, 0))
    trained_from: int = 0
    warm_start: int | None = None
    seed: int = 0
    pace: Pace = field(default_factory=lambda: Pace(0, 0, 0))
    checkpoint: str = ""


class Challenger(Stage[ChallengerRecord]):
    """A trained model, not yet judged."""

    name = "challenger"
    depends = ("feature_store",)
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
        return digest([known, settings])

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
        """Train on all partitions, or from the champion on what came after its training.

        Raises:
            CorankError: there is nothing to train on or to judge by, or training met what is not finite.
        """
        from models.artifact import save_artifact
        from pipeline.deployment.selfcheck import selfcheck_document
        from pipeline.training.training import TrainingJob, require_both_classes, summarize, train

        require_validated(workspace)
        (key,) = parts
        config = workspace.config
        with workspace.progress.stage(self.name) as stage:
            stage.say("preparing")
            ensure_ray(config.ray)
            split = choose_cuts(workspace)
            champion = workspace.registry.champion() if workspace.warm_start else None
            weights, low = (None, split.train) if champion is None else _warm_start(workspace, champion)
            train_source, validation, test = (
                sample_source(workspace, *span)
                for span in ((low, split.validation), (split.validation, split.test), (split.test, FOREVER))
            )
            require_both_classes(config.gate_task, "test", summarize(test), "Widen `split.test`")
            require_both_classes(config.gate_task, "validation", summarize(validation), "Widen `split.validation`")
            summary = summarize(train_source)
            if not summary.candidates:
                raise CorankError(
                    f"no requests to train on between {close_text(low)} and {close_text(split.validation)}; take more "
                    "partitions or narrow `split`"
                )
            pace = config.training.pace(summary.candidates)
            job = TrainingJob(
                name=f"{config.name}-{key[:12]}" + (f"-from-{champion.number}" if champion else ""),
                schema=config.schema_,
                model=config.model,
                training=config.training,
                pace=pace,
                train=train_source,
                validation=validation,
                statistics=summary.numbers if champion is None else {},
                gate_task=config.gate_task,
                warm_start=weights,
            )

            eta, epochs = Eta(), config.training.epochs

            def said(report: Any) -> None:
                if "note" in report:
                    workspace.progress.note(report["note"])
                    return
                score = report.get(f"{config.gate_task}_auc")
                metric = f", validation AUC {score:.4f}" if score is not None else ""
                done = (report["epoch"] - 1) * pace.candidates + report["candidates"]
                speed = eta.tell(done, epochs * pace.candidates, "candidates")
                stage.say(
                    f"epoch {report['epoch']}/{epochs}, {report['candidates']:,} of {pace.candidates:,} candidates"
                    f"{speed}{metric}"
                )

            result = train(job, config.path("checkpoints"), said, elastic=config.ray.address is not None)
            made_from = SAMPLES.inputs(workspace)
            lineage = {
                "pipeline": config.name,
                # those whose samples it was made from: retention keeps them while the model is live
                "partitions": {
                    partition: made_from[partition]
                    for partition in trainable(workspace)
                    if workspace.log.bounds(partition)[1] > low
                },
                **workspace.lineage(),
                "cuts": asdict(split),
                "trained_from": low,
                "warm_start": champion.number if champion else None,
                "seed": config.training.seed,
                "pace": asdict(pace),
                "checkpoint": f"{config.path('checkpoints')}/{job.name}",
            }
            directory = config.local_path("models", job.name)
            version = save_artifact(
                directory,
                result.model,
                {
                    "lineage": lineage,
                    "metrics": {"validation": result.history},
                    "selfcheck": selfcheck_document(result.model, test),
                },
            )
            record = ChallengerRecord(
                inputs=key,
                artifact=str(directory),
                version=version,
                history=result.history,
                **{**lineage, "cuts": split, "pace": pace},
            )
            workspace.records.write(self, key, record)
            best = max(result.history, key=lambda entry: entry[f"{config.gate_task}_auc"] or 0.0)
            stage.say(
                f"model {version}, {len(result.history)} epochs of {best['candidates']:,} candidates, "
                f"best validation AUC {best[f'{config.gate_task}_auc']:.4f} in epoch {best['epoch']}"
            )
        return {key: record}

    def counts(self, workspace: Workspace) -> tuple[str, str] | None:
        record = workspace.records.read(self, self.key(workspace))
        if record is None:
            return None
        return f"{record.history[-1]['candidates']:,} candidates", f"{len(record.history)} epochs"


CHALLENGER = Challenger()


def _warm_start(workspace: Workspace, champion: ModelVersion) -> tuple[Mapping[str, Tensor], int]:
    """The champion's weights, and the ts from which on its successor is trained, microseconds UTC.

    Raises:
        CorankError: its features or sizes differ from the config's.
    """
    from models.artifact import load_artifact
    from models.profile import on_meta

    config, artifact = workspace.config, load_artifact(champion.artifact)
    if artifact.schema != config.schema_:
        raise CorankError(
            f"retraining starts from model version {champion.number}, whose features differ from the "
            "config's; train from scratch with `corank run`"
        )
    own = on_meta(config.schema_, config.model.name, config.model.preset, **config.model.overrides)
    same = [model.describe() | {"dropout": None} for model in (artifact.model, own)]
    if same[0] != same[1]:
        raise CorankError(
            f"retraining starts from model version {champion.number}, whose model or sizes differ from "
            "the config's `model:`; train from scratch with `corank run`"
        )
    return artifact.model.state_dict(), int(artifact.metadata["lineage"]["cuts"]["validation"])


def choose_cuts(workspace: Workspace) -> Cuts:
    """Cuts in request ts from the counts in the records; reads only the partitions that hold a cut.

    Raises:
        CorankError: no partition can be trained on yet, or there are too few requests.
    """
    log, split = workspace.log, workspace.config.split
    requests = {one: workspace.records.require(SAMPLES, one).requests for one in trainable(workspace)}
    if not requests:
        known = log.bounds(workspace.partitions[0])[1] + workspace.config.schema_.attribution_window
        raise CorankError(
            f"no partition can be trained on yet: the attribution window of {workspace.partitions[0]} ends at "
            f"{close_text(known)}"
        )
    total = sum(requests.values())
    test_rank = total - round(total * split.test)
    validation_rank = test_rank - round(total * split.validation)
    if validation_rank < 1 or test_rank >= total or test_rank == validation_rank:
        raise CorankError(
            f"{total:,} requests are too few for split.test {split.test} and split.validation {split.validation}; "
            "import more partitions or widen the split"
        )
    return Cuts(
        train=log.bounds(next(iter(requests)))[0],
        validation=_request_ts(workspace, requests, validation_rank),
        test=_request_ts(workspace, requests, test_rank),
    )


def _request_ts(workspace: Workspace, requests: Mapping[str, int], rank: int) -> int:
    """ts of the request of this rank (from 0) in time order."""
    from features.sample_table import request_times

    for partition, count in requests.items():
        if rank < count:
            samples = sample_source(workspace, 0, FOREVER, (partition,))
            times = sorted(ts for file in samples.files() for ts in request_times(samples.read(file)))
            return int(times[rank])
        rank -= count
    raise AssertionError("rank beyond the counted requests")
