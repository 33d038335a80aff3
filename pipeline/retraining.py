"""What a retraining does next: which partition, and whether anything new is there to train on."""

from __future__ import annotations

from dataclasses import dataclass

from features.errors import CorankError
from pipeline.config import Config
from pipeline.progress import Progress
from pipeline.stages import STAGES, pending
from pipeline.stages.challenger import CHALLENGER
from pipeline.workspace import Workspace


@dataclass(frozen=True)
class Retraining:
    """The stages of ``workspace`` that have work are run, those that train only if ``training``."""

    workspace: Workspace
    training: bool
    says: str


def next_retraining(config: Config) -> Retraining:
    """The next step after what the model's versions cover.

    One partition is taken at a time; of one whose labels are not known yet, samples and features are brought up to
    date, and the next one follows. Labels that have become known are trained on. Rows that came late to partitions
    that were trained on are not: they rebuild samples and features.

    Raises:
        CorankError: there is no champion to start from.
    """
    whole = Workspace(config, Progress())
    champion = whole.registry.champion()
    if champion is None:
        raise CorankError("there is no champion to start from; train the first one with `corank run`")
    versions = whole.registry.versions()
    # a rejected challenger covers its partition too, else it would be trained for ever
    covered = max(version.tags["partition"] for version in versions)
    newer = [partition for partition in whole.log.shown if partition > covered]
    current = Workspace(config, Progress(), until=covered if newer else None, warm_start=True)
    left = {stage.name for stage in STAGES if stage.trains} & set(pending(current))
    if left and CHALLENGER.name not in left:
        return Retraining(current, True, f"finishing partition {covered}")
    trained = max(version.tags.get("trained", covered) for version in versions)

    def has_labels(workspace: Workspace) -> bool:
        return any(workspace.log.is_attributed(one) for one in workspace.partitions if one > trained)

    for partition in newer:
        following = Workspace(config, Progress(), until=partition, warm_start=True)
        if pending(following, training := has_labels(following)):
            how = f"starting from champion version {champion.number}" if training else "whose labels are not known yet"
            return Retraining(following, training, f"partition {partition}, {how}")
    if left and has_labels(current):
        return Retraining(current, True, f"labels up to {covered}, starting from champion version {champion.number}")
    newest = whole.log.shown[-1]
    return Retraining(
        current, False, f"Nothing to train: what is known up to {newest}, the newest closed partition, is trained on."
    )
