"""``progressive_validation``: a new partition is scored by the champion before any model trains on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from features.digest import digest
from pipeline.records import LogRecord
from pipeline.runtime import ensure_ray
from pipeline.stages.samples import FOREVER, SAMPLES, sample_source, trainable
from pipeline.stages.stage import Stage
from pipeline.workspace import Workspace

if TYPE_CHECKING:
    from pipeline.workspace.registry import ModelVersion


@dataclass(frozen=True)
class ProgressiveRecord(LogRecord):
    """How good the champion of the time was on a partition that no version had trained on: a point of its life curve.

    Attributes:
        champion: number of its version.
        frozen: number of the oldest version that reads the same features: what never training again would have given.
        versions_scored: per version and task its metrics (:class:`models.metrics.TaskMetrics`).
    """

    champion: int = 0
    frozen: int = 0
    versions_scored: dict[str, dict[str, dict[str, float | None]]] = field(default_factory=dict)


class ProgressiveValidation(Stage[ProgressiveRecord]):
    """The champion on new partitions, before anything trains on them."""

    name = "progressive_validation"
    depends = ("samples",)
    record = ProgressiveRecord
    partitioned = True
    trains = True
    kinds = ("ray",)

    def inputs(self, workspace: Workspace) -> dict[str, str]:
        """For the partitions with requests that are newer than those the champion was made from."""
        champion = workspace.registry.champion()
        if champion is None:
            return {}
        samples = SAMPLES.inputs(workspace)
        newest = champion.tags.get("trained", champion.tags["partition"])
        content = champion.tags.get("content", "")
        newer = [partition for partition in trainable(workspace) if partition > newest]
        built = {partition: workspace.records.read(SAMPLES, partition) for partition in newer}
        empty = {partition for partition, record in built.items() if record is not None and not record.requests}
        return {partition: digest([content, samples[partition]]) for partition in newer if partition not in empty}

    def run(self, workspace: Workspace, parts: Sequence[str]) -> dict[str, ProgressiveRecord]:
        """Score partitions with the champion, and with the oldest version.

        Raises:
            CorankError: a score is not finite.
        """
        from pipeline.evaluation.scoring import score_source, scored_metrics

        champion, inputs = workspace.registry.champion(), self.inputs(workspace)
        assert champion is not None
        frozen = _oldest_alike(workspace, champion)
        records: dict[str, ProgressiveRecord] = {}
        with workspace.progress.stage(self.name) as stage:
            ensure_ray(workspace.config.ray)
            for done, part in enumerate(parts, start=1):
                stage.say(f"{part} ({done}/{len(parts)}), champion version {champion.number}")
                scored: dict[str, dict[str, Any]] = {}
                for version in {version.number: version for version in (champion, frozen)}.values():
                    found = score_source(version.artifact, sample_source(workspace, 0, FOREVER, (part,)))
                    scored[str(version.number)] = scored_metrics(workspace.config.schema_, found)
                records[part] = ProgressiveRecord(
                    inputs=inputs[part],
                    champion=champion.number,
                    frozen=frozen.number,
                    versions_scored=scored,
                    **workspace.lineage(),
                )
                workspace.records.write(self, part, records[part])
            task = workspace.config.gate_task
            found_auc = [record.versions_scored[str(champion.number)][task]["auc"] for record in records.values()]
            values = ", ".join("–" if value is None else f"{value:.4f}" for value in found_auc[-5:])
            stage.say(f"champion version {champion.number} on {len(parts)} new partitions: {task} AUC {values}")
        return records

    def rows(self, record: ProgressiveRecord) -> int:
        scored = record.versions_scored.values()
        return sum(int(max(metrics["impressions"] or 0 for metrics in tasks.values())) for tasks in scored)


PROGRESSIVE_VALIDATION = ProgressiveValidation()


def _oldest_alike(workspace: Workspace, champion: ModelVersion) -> ModelVersion:
    """The oldest version whose artifact is there and that reads the same features as the champion."""
    from pipeline.workspace.registry import published_schema

    features_read = published_schema(champion.artifact)
    alike = [
        version for version in workspace.registry.versions() if published_schema(version.artifact) == features_read
    ]
    return alike[-1] if alike else champion
