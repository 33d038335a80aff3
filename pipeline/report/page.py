"""The content of a report, from the records and the registry; the log itself is not read."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from features.errors import CorankError, writing
from pipeline.cost import costs
from pipeline.evaluation.criterion import cells
from pipeline.evaluation.texts import classes_text, number_text
from pipeline.stages import STAGES
from pipeline.stages.challenger import CHALLENGER, ChallengerRecord
from pipeline.stages.champion import CHAMPION
from pipeline.stages.deployment import CURRENT, DEPLOYMENT
from pipeline.stages.evaluation import EVALUATION, EvaluationRecord, report_path
from pipeline.stages.progressive_validation import PROGRESSIVE_VALIDATION
from pipeline.stages.refit import REFIT, RefitRecord, refit_key
from pipeline.stages.samples import SAMPLES, SamplesRecord
from pipeline.stages.validated import VALIDATED, ValidatedRecord
from pipeline.workspace import Workspace, close_text
from pipeline.workspace.registry import PROMOTED_BY_HAND

if TYPE_CHECKING:
    from pipeline.workspace.registry import ModelVersion

METRICS = {
    "auc": "AUC",
    "uauc": "UAUC",
    "gauc": "GAUC",
    "query_auc": "query AUC",
    "logloss": "logloss",
    "normalised_entropy": "normalised entropy",
    "positives": "positives",
    "predicted": "predicted",
}
SHOWN_VERSIONS = 20
SHOWN_LIFE = 90
"""Points of the life curve, the newest."""


def report_of(workspace: Workspace, number: int | None) -> Path:
    """Write the report on a version again; returns its path.

    Args:
        number: of the version; None: the champion.

    Raises:
        CorankError: there is no such version, or no record of its verdict.
    """
    registry = workspace.registry
    version = registry.champion() if number is None else registry.version(number)
    if version is None:
        raise CorankError("there is no champion to report on; `corank run` trains one")
    key = version.tags.get("evaluation", "")
    if not key or workspace.records.read(EVALUATION, key) is None:
        raise CorankError(f"model version {version.number}: there is no record of its verdict, so nothing to report")
    return write_report(workspace, key)


def write_report(workspace: Workspace, key: str) -> Path:
    """Write the report on a challenger, so that it appears whole, and add it to the run of its version in MLflow.

    Args:
        key: of the record of its verdict.

    Raises:
        CorankError: records of the challenger are gone or damaged.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from plotly.offline import get_plotlyjs

    told = _told(workspace, key)
    environment = Environment(
        loader=PackageLoader("pipeline.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"metric": number_text, "moment": close_text}
    page = environment.get_template("page.html.j2").render(
        **_sections(workspace, key, told), metrics=METRICS, plotly_js=get_plotlyjs()
    )
    path = report_path(workspace.config, told.evaluation.model)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch, content = path.with_suffix(".tmp"), page.encode()
    with writing(path, len(content)):
        scratch.write_bytes(content)
    os.replace(scratch, path)
    if told.version is not None and told.version.run:
        workspace.registry.log_report(told.version.run, path)
    return path


@dataclass(frozen=True)
class _Told:
    """The records of one challenger."""

    evaluation: EvaluationRecord
    challenger: ChallengerRecord
    refit: RefitRecord | None
    version: ModelVersion | None
    versions: list[ModelVersion]


def _told(workspace: Workspace, key: str) -> _Told:
    records = workspace.records
    evaluation = records.require(EVALUATION, key)
    trained = [challenger for challenger in records.all(CHALLENGER).values() if challenger.version == evaluation.model]
    if not trained:
        raise CorankError(f"model {evaluation.model}: the record of its training is gone; run `corank run` again")
    refit = records.read(REFIT, refit_key(key))
    published = refit.version if refit else evaluation.model
    versions = workspace.registry.versions()
    version = next((registered for registered in versions if registered.tags.get("content") == published), None)
    return _Told(evaluation, trained[-1], refit, version, versions)


def _sections(workspace: Workspace, key: str, told: _Told) -> dict[str, Any]:
    from pipeline.report.figures import calibration_figure, learning_figure, life_figure, partitions_figure

    config, records = workspace.config, workspace.records
    evaluation, challenger = told.evaluation, told.challenger
    partitions = sorted(evaluation.fingerprints)
    data = [
        (
            partition,
            records.read(VALIDATED, partition) or ValidatedRecord(),
            records.read(SAMPLES, partition) or SamplesRecord(),
        )
        for partition in partitions
    ]
    shown = {
        partition: (validated.rows.get("impressions", 0) - validated.quarantined, validated.quarantined)
        for partition, validated, _ in data
    }
    lives = _lives(workspace, partitions)
    bins = {task: entry.get("calibration") or [] for task, entry in evaluation.tasks.items()}
    spent = costs(records, partitions[-1]) if partitions else {}
    deployed = records.read(DEPLOYMENT, CURRENT)
    outcome = records.read(CHAMPION, key)
    return {
        "config": config,
        "evaluation": evaluation,
        "challenger": challenger,
        "refit": told.refit,
        "version": told.version,
        "outcome": outcome.outcome if outcome else "not registered yet",
        "deployed": deployed if deployed and told.version and deployed.number == told.version.number else None,
        "data": data,
        "findings": [(partition, finding["message"]) for partition, record, _ in data for finding in record.findings],
        "data_docs": data[-1][1].data_docs if data else "–",
        "partitions_figure": partitions_figure(shown),
        "learning_figure": learning_figure(challenger.history, list(evaluation.tasks)),
        "calibration_figure": calibration_figure(bins) if any(bins.values()) else "",
        "life_figure": life_figure(lives) if lives else "",
        "tasks": {
            task: (_compared(evaluation, entry), _gains(entry), classes_text(entry))
            for task, entry in evaluation.tasks.items()
        },
        "criteria": [cells(criterion) for criterion in evaluation.criteria],
        "history": history(workspace, told.versions)[:SHOWN_VERSIONS],
        "gate_task": config.gate_task,
        "costs": [(stage.name, spent[stage.name]) for stage in STAGES if stage.name in spent],
    }


def _lives(workspace: Workspace, partitions: Sequence[str]) -> dict[str, list[tuple[str, float | None, float | None]]]:
    """Per task and partition up to now the AUC of the champion and of the frozen model."""
    lives: dict[str, list[tuple[str, float | None, float | None]]] = {}
    found = workspace.records.all(PROGRESSIVE_VALIDATION)
    for partition in sorted(name for name in found if not partitions or name <= partitions[-1])[-SHOWN_LIFE:]:
        record = found[partition]
        champion, frozen = (record.versions_scored.get(str(number), {}) for number in (record.champion, record.frozen))
        for task in champion:
            point = (partition, champion[task].get("auc"), frozen.get(task, {}).get("auc"))
            lives.setdefault(task, []).append(point)
    return lives


def _compared(evaluation: EvaluationRecord, entry: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The models whose metrics stand beside each other."""
    others = {
        "baseline": entry["baseline"],
        **entry.get("references", {}),
        f"champion version {evaluation.champion}": entry["champion"],
    }
    return {"challenger": entry} | {name: row for name, row in others.items() if row}


def _gains(entry: dict[str, Any]) -> list[tuple[str, dict[str, float]]]:
    found = [(other, entry[f"auc_gain_over_{other}"]) for other in ("baseline", "champion")]
    return [(other, gain) for other, gain in found if gain]


@dataclass(frozen=True)
class Life:
    """A version in the history of champions."""

    version: ModelVersion
    auc: float | None
    gain: dict[str, float] | None
    promoted: bool
    problem: str


def history(workspace: Workspace, versions: Sequence[ModelVersion]) -> list[Life]:
    """Versions, newest first, with metrics of the gate's task and what became of them."""
    lives, task = [], workspace.config.gate_task
    for version in versions:
        key = version.tags.get("evaluation", "")
        evaluation, outcome = workspace.records.read(EVALUATION, key), workspace.records.read(CHAMPION, key)
        entry = evaluation.tasks.get(task, {}) if evaluation else {}
        problem = "; ".join(evaluation.reasons) if evaluation else ""
        if failure := version.tags.get("failed live"):
            problem = f"failed live: {failure}"
        by_hand = PROMOTED_BY_HAND in version.tags
        promoted = bool(version.aliases) or by_hand or bool(outcome and outcome.promoted)
        lives.append(Life(version, entry.get("auc"), entry.get("auc_gain_over_baseline"), promoted, problem))
    return lives
