"""The next step of a retraining: its partitions, what it starts from, and whether there is anything new."""

from __future__ import annotations

from dataclasses import dataclass

from features.errors import CorankError
from pipeline.config import Config
from pipeline.progress import Progress
from pipeline.stages import STAGES, pending
from pipeline.stages.challenger import CHALLENGER
from pipeline.workspace import Workspace
from pipeline.workspace.registry import ModelVersion


@dataclass(frozen=True)
class Retraining:
    """A step: all stages of ``workspace`` that have work run, those that train only if ``training``.

    Attributes:
        says: what the step is, for the user.
    """

    workspace: Workspace
    training: bool
    says: str


def next_retraining(
    config: Config,
    partition: str | None = None,
    together: bool = False,
    full: bool = False,
    passed_over: str | None = None,
) -> Retraining | None:
    """The next step after the partitions that versions cover; None when nothing is left after ``passed_over``.

    One partition is taken at a time; of one whose labels are not known yet, samples and features are brought up to
    date, and the next one follows. Labels that have become known are trained on. Rows that came late to partitions
    that were trained on rebuild samples and features, and, with ``retraining.late_rows``, train from scratch.

    Args:
        partition: the last one to take; default: the newest closed one.
        together: all new ones at once.
        full: from scratch, on all partitions up to the last one, whatever was trained before.
        passed_over: the newest partition that has too few requests to be taken alone; those after it take them along.

    Raises:
        CorankError: there is no champion to start from, or no such partition.
    """
    whole = Workspace(config, Progress(), until=partition)
    champion = whole.registry.champion()
    if champion is None:
        raise CorankError("there is no champion to start from; train the first one with `corank run`")
    if full:
        newest = whole.log.shown[-1]
        anew = Workspace(config, Progress(), until=newest)
        if CHALLENGER.name not in pending(anew):
            anew = Workspace(config, Progress(), until=newest, from_scratch=True)
        return Retraining(anew, True, f"from scratch, up to {newest}")
    versions = whole.registry.versions()
    # a rejected challenger covers its partition too, else it would be trained for ever
    covered = max(version.tags["partition"] for version in versions)
    newer = [name for name in whole.log.shown if name > max(covered, passed_over or "")]
    if passed_over is not None and not newer:
        return None
    until = covered if newer else partition
    current = Workspace(config, Progress(), until=until, warm_start=True)
    left = {stage.name for stage in STAGES if stage.trains} & set(pending(current))
    if left and CHALLENGER.name not in left:
        return Retraining(current, True, f"finishing partition {covered}")
    trained = max(version.tags.get("trained", covered) for version in versions)

    def has_labels(workspace: Workspace) -> bool:
        return any(workspace.log.is_attributed(name) for name in workspace.partitions if name > trained)

    for following in newer[-1:] if together else newer:
        scratch = _is_due(config, versions, whole.log.shown, following)
        step = Workspace(config, Progress(), until=following, warm_start=not scratch)
        if pending(step, training := has_labels(step)):
            if not training:
                how = "whose labels are not known yet"
            else:
                how = "from scratch" if scratch else f"starting from champion version {champion.number}"
            which = f"partitions {newer[0]} … {following}" if together and len(newer) > 1 else f"partition {following}"
            return Retraining(step, training, f"{which}, {how}")
    if left and has_labels(current):
        return Retraining(current, True, f"labels up to {covered}, starting from champion version {champion.number}")
    newest = whole.log.shown[-1]
    if left and config.retraining.late_rows:
        anew = Workspace(config, Progress(), until=until)
        return Retraining(anew, True, f"rows came late: from scratch, up to {newest}")
    return Retraining(
        current, False, f"Nothing to train: what is known up to {newest}, the newest closed partition, is trained on."
    )


def _is_due(config: Config, versions: list[ModelVersion], known: list[str], following: str) -> bool:
    """Whether ``retraining.full_every`` partitions have passed since the newest version from scratch."""
    every = config.retraining.full_every
    if every is None:
        return False
    scratch = [
        version.tags["partition"] for version in versions if version.tags.get("started from", "scratch") == "scratch"
    ]
    return sum(max(scratch, default="") < partition <= following for partition in known) >= every
