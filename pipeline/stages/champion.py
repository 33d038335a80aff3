"""``champion``: the challenger is registered, and promoted when it passed its gate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from features.errors import CorankError
from pipeline.records import LogRecord
from pipeline.stages.challenger import CHALLENGER, ChallengerRecord
from pipeline.stages.evaluation import EVALUATION, EvaluationRecord, report_path
from pipeline.stages.refit import REFIT, RefitRecord
from pipeline.stages.stage import Stage
from pipeline.workspace import Workspace

if TYPE_CHECKING:
    from pipeline.workspace.registry import ModelVersion


@dataclass(frozen=True)
class ChampionRecord(LogRecord):
    """What became of a challenger.

    Attributes:
        number: of its version in the registry.
        model: version of its content.
        judged: version of the content that was judged; another, where it was refitted.
        outcome: in words, for the user.
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

    def stale(self, workspace: Workspace) -> list[str]:
        """Also when the registry has lost the version, or every champion."""
        (key,) = self.inputs(workspace)
        record = workspace.records.read(self, key)
        if record is None:
            return [key]
        known = [version.tags.get("content") for version in workspace.registry.versions()]
        lost = record.model not in known or (record.promoted and workspace.registry.champion() is None)
        return [key] if lost else super().stale(workspace)

    def run(self, workspace: Workspace, parts: Sequence[str]) -> dict[str, ChampionRecord]:
        """Register the challenger in MLflow; it becomes champion when it passed the gate.

        Raises:
            CorankError: it did not pass and there is no champion to keep.
        """
        (key,) = parts
        config = workspace.config
        challenger = workspace.records.require(CHALLENGER, CHALLENGER.key(workspace))
        evaluation = workspace.records.require(EVALUATION, key)
        published = workspace.records.require(REFIT, REFIT.key(workspace))
        with workspace.progress.stage(self.name) as stage:
            stage.say("registering in MLflow")
            registry = workspace.registry
            if not registry.versions():  # the registry is new, as its database was lost
                for number in restore_versions(workspace):
                    workspace.progress.note(f"version {number} was registered again from its record")
            params = {
                f"{section}.{name}": value
                for section in ("model", "training", "holdout")
                for name, value in config.model_dump(mode="json")[section].items()
            }
            version = _registered(workspace, published, challenger, key, evaluation, workspace.partitions, params)
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
            page = report_path(config, challenger.version)
            raise CorankError(
                f"model {outcome}, and there is no champion to serve. See the report {page}; "
                "change the config or the gate (`evaluation`), then run again."
            )
        return {key: record}


CHAMPION = Champion()


def _registered(
    workspace: Workspace,
    published: ChallengerRecord | RefitRecord,
    challenger: ChallengerRecord,
    key: str,
    evaluation: EvaluationRecord,
    partitions: Sequence[str],
    params: Mapping[str, Any],
) -> ModelVersion:
    """The version of a published model, registered when there is none; it names this verdict, the newest.

    Args:
        challenger: the judged model, which it is or comes from.
        key: of the verdict.
        partitions: of the log at that time.
        params: shown with its run.
    """
    from pipeline.workspace.registry import verdict_tags

    registry = workspace.registry
    known = [version for version in registry.versions() if version.tags.get("content") == published.version]
    if known:
        return registry.judged(known[0].number, key, evaluation.reasons)
    metrics = {
        f"test/{task}_{name}": value
        for task, entry in evaluation.tasks.items()
        for name, value in entry.items()
        if isinstance(value, float)
    }
    run = registry.log_run(
        f"{workspace.config.name}-{published.version}",
        published.version,
        {**params, "partitions": f"{partitions[0]} … {partitions[-1]}", "code": challenger.code},
        metrics,
        challenger.history,
        published.artifact,
    )
    tags = {
        "content": published.version,
        "judged": challenger.version,
        "started from": str(challenger.warm_start or "scratch"),
        **verdict_tags(key, evaluation.reasons),
        "partition": partitions[-1],
        "trained": max(challenger.partitions),
    }
    unmeasured = [task for task, entry in evaluation.tasks.items() if entry["auc"] is None]
    if unmeasured:
        tags["no test AUC of"] = ", ".join(unmeasured)
    return registry.register(published.artifact, run, tags)


def published_models(workspace: Workspace) -> dict[str, ChallengerRecord | RefitRecord]:
    """Every model that a record names, by the version of its content."""
    judged = {challenger.version: challenger for challenger in workspace.records.all(CHALLENGER).values()}
    return {**judged, **{refit.version: refit for refit in workspace.records.all(REFIT).values()}}


def restore_versions(workspace: Workspace) -> list[int]:
    """Register again, in a registry without versions, all versions that records name and whose artifacts are whole;
    returns their numbers. Champion is what was deployed or promoted last.

    No record has the parameters of the trainings, nor promotions by hand that were never deployed.
    """
    from models.artifact import problem_of_artifact

    records, registry = workspace.records, workspace.registry
    models, challengers = (
        published_models(workspace),
        {record.version: record for record in records.all(CHALLENGER).values()},
    )
    verdicts = records.all(CHAMPION)
    written = {key: (records.get(CHAMPION.name, key) or {})["recorded_at"] for key in verdicts}
    restored: list[int] = []
    for number in range(1, max((verdict.number for verdict in verdicts.values()), default=0) + 1):
        for key, verdict in sorted(verdicts.items(), key=lambda entry: written[entry[0]]):
            published, evaluation = models.get(verdict.model), records.read(EVALUATION, key)
            challenger = challengers.get(verdict.judged or verdict.model)
            if verdict.number != number or published is None or challenger is None or evaluation is None:
                continue
            if problem_of_artifact(published.artifact) is None:
                partitions = sorted(verdict.fingerprints)
                _registered(workspace, published, challenger, key, evaluation, partitions, {})
                restored.append(number)
        if number not in restored:  # takes the number, so that later versions keep theirs
            registry.drop(registry.register("gone", "", {}).number)
    promoted = [(written[key], verdict.number) for key, verdict in verdicts.items() if verdict.promoted]
    if deployed := records.get("deployment", "current"):
        promoted.append((deployed["recorded_at"], deployed["number"]))
    served = list(dict.fromkeys(number for _, number in sorted(promoted, reverse=True) if number in restored))
    for number in reversed(served[:2]):
        registry.promote(number)
    return list(dict.fromkeys(restored))
