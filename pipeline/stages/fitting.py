"""Training inside a stage: it shows progress on the stage's line and publishes the model with its lineage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from features.errors import NoSpaceError, message_of
from pipeline.progress import Eta
from pipeline.training.checkpoints import Checkpoints

if TYPE_CHECKING:
    from features.samples.source import SampleSource
    from pipeline.progress import Line
    from pipeline.training.job import TrainingJob, TrainingResult
    from pipeline.workspace import Workspace


def fit(workspace: Workspace, line: Line, job: TrainingJob) -> TrainingResult:
    """Train, and show epoch, candidates, speed and time left.

    Raises:
        CorankError: training met what is not finite.
    """
    from pipeline.training.training import train

    config, eta, epochs = workspace.config, Eta(), job.training.epochs
    tasks, failed = [task.name for task in job.schema.tasks], list[Exception]()

    def tell(report: Any) -> None:
        if "note" in report:
            workspace.progress.note(report["note"])
            return
        losses = report.get("losses", {})
        measured = {f"train/{task}_loss": losses[task] for task in losses}
        measured |= {
            f"validation/{task}_{metric}": report[f"{task}_{metric}"]
            for task in tasks
            for metric in ("auc", "uauc")
            if report.get(f"{task}_{metric}") is not None
        }
        try:
            log(report["step"], measured)
        except NoSpaceError:
            raise
        except Exception as error:  # a chart is no reason to end a training
            if not failed:
                workspace.progress.note(f"MLflow shows no more of this training: {message_of(error)}")
            failed.append(error)
        score = report.get(f"{job.gate_task}_auc")
        metric = f", validation AUC {score:.4f}" if score is not None else ""
        metric = f", loss {', '.join(f'{task} {loss:.4f}' for task, loss in losses.items())}" if losses else metric
        done = (report["epoch"] - 1) * job.pace.candidates + report["candidates"]
        speed = eta.tell(done, epochs * job.pace.candidates, "candidates")
        line.say(
            f"epoch {report['epoch']}/{epochs}, {report['candidates']:,} of {job.pace.candidates:,} candidates"
            f"{speed}{metric}"
        )

    with workspace.registry.training(job.name) as log:
        return train(job, config.path("checkpoints"), tell, elastic=config.ray.address is not None)


def publish(
    workspace: Workspace, name: str, result: TrainingResult, lineage: Mapping[str, Any], test: SampleSource
) -> tuple[Path, str]:
    """Write the artifact of a training, whole or not at all; returns its folder and the version of its content.

    Args:
        test: samples from whose requests the self-check is made.
    """
    from models.artifact import save_artifact
    from pipeline.deployment.selfcheck import selfcheck_document

    directory = workspace.config.local_path("models", name)
    documents = {
        "lineage": lineage,
        "metrics": {"validation": result.history},
        "selfcheck": selfcheck_document(result.model, test),
    }
    return directory, save_artifact(directory, result.model, documents)


def optimizer_states(workspace: Workspace, checkpoint: str) -> Sequence[dict[str, Any]] | None:
    """The optimizers' states at the end of a training; None, with a note to the user, if its checkpoints are gone."""
    checkpoints = Checkpoints(checkpoint)
    epoch = checkpoints.newest(workspace.progress.note)
    if not epoch:
        workspace.progress.note(f"the optimizer's state at {checkpoint} is gone: it starts anew")
        return None
    return list(checkpoints.load(epoch)["optimizers"])
