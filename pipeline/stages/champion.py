"""``champion``: the challenger is registered, and promoted when it passed its gate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from features.errors import CorankError
from pipeline.records import LogRecord
from pipeline.stages.challenger import CHALLENGER
from pipeline.stages.evaluation import EVALUATION
from pipeline.stages.refit import REFIT
from pipeline.stages.stage import Stage
from pipeline.workspace import Workspace


@dataclass(frozen=True)
class ChampionRecord(LogRecord):
    """What became of a challenger.

    Attributes:
        number: of its version in the registry.
        model: version of its content.
        judged: version of the content that was judged; another, where it was refitted.
        outcome: as it is told to a user.
    """

    number: int = 0
    model: str = ""
    judged: str = ""
    promoted: bool = False
    outcome: str = ""


class Champion(Stage[ChampionRecord]):
    """The challenger in MLflow's registry; champion when it passed its gate."""

    name = "champion"
    depends = ("evaluation", "refit")
    record = ChampionRecord
    trains = True
    kinds = ("mlflow",)

    def inputs(self, workspace: Workspace) -> dict[str, str]:
        return EVALUATION.inputs(workspace)

    def run(self, workspace: Workspace, parts: Sequence[str]) -> dict[str, ChampionRecord]:
        """Register the challenger in MLflow; it becomes champion when it passed the gate.

        Raises:
            CorankError: it did not pass and there is no champion to keep.
        """
        (key,) = parts
        config, partitions = workspace.config, workspace.partitions
        challenger = workspace.records.require(CHALLENGER, CHALLENGER.key(workspace))
        evaluation = workspace.records.require(EVALUATION, key)
        published = workspace.records.require(REFIT, REFIT.key(workspace))
        with workspace.progress.stage(self.name) as stage:
            stage.say("registering in MLflow")
            registry = workspace.registry
            metrics = {
                f"test/{task}_{name}": value
                for task, entry in evaluation.tasks.items()
                for name, value in entry.items()
                if isinstance(value, float)
            }
            known = [v for v in registry.versions() if v.tags.get("content") == published.version]
            if known:
                version = registry.judged(known[0].number, key)
            else:
                flat = {
                    f"{section}.{name}": value
                    for section in ("model", "training", "holdout")
                    for name, value in config.model_dump(mode="json")[section].items()
                }
                run = registry.log_run(
                    f"{config.name}-{published.version}",
                    published.version,
                    {**flat, "partitions": f"{partitions[0]} … {partitions[-1]}", "code": challenger.code},
                    metrics,
                    challenger.history,
                    published.artifact,
                )
                tags = {
                    "content": published.version,
                    "judged": challenger.version,
                    "started from": str(challenger.warm_start or "scratch"),
                    "evaluation": key,
                    "partition": partitions[-1],
                    "trained": max(challenger.partitions),
                }
                unmeasured = [task for task, entry in evaluation.tasks.items() if entry["auc"] is None]
                if unmeasured:
                    tags["no test AUC of"] = ", ".join(unmeasured)
                version = registry.register(published.artifact, run, tags)
            if evaluation.passed:
                registry.promote(version.number)
                outcome = f"version {version.number} is champion"
            else:
                outcome = f"version {version.number} not promoted: " + "; ".join(evaluation.reasons)
            record = ChampionRecord(
                inputs=key,
                number=version.number,
                model=published.version,
                judged=challenger.version,
                promoted=evaluation.passed,
                outcome=outcome,
                **workspace.lineage(),
            )
            workspace.records.write(self, key, record)
            stage.say(outcome)
        if registry.champion() is None:
            raise CorankError(
                f"model {outcome}, and there is no champion to serve. See the report {evaluation.report}; "
                "change the config or the gate (`evaluation`), then run again."
            )
        return {key: record}


CHAMPION = Champion()
