"""Checking every piece of a workspace, and mending what is damaged.

Each check names what it finds: the file, what it holds, what is wrong, what is lost with it, and how it is mended. A
damaged piece that corank derived is removed so that the stages make it again; the user's own data are never changed.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from pyarrow import fs

from features.builder.states import ITEM_AGGREGATES, STATE, USER_AGGREGATES
from features.damage import problem_of_database, remove_database
from features.delta.damage import damaged_files, lost_files
from features.delta.maintenance import derived_tables
from features.delta.paths import file_system
from features.delta.table import Table
from features.errors import CorankError, UnreadableError
from features.store.compare import differing
from features.store.online import apply
from features.validation.gate import damaged_settings
from models.artifact import problem_of_artifact, read_document, version_of
from pipeline.records import DamagedRecordError
from pipeline.stages import STAGES
from pipeline.stages.challenger import CHALLENGER
from pipeline.stages.champion import CHAMPION, published_models, restore_versions
from pipeline.stages.evaluation import EVALUATION
from pipeline.stages.feature_store import (
    FEATURE_STORE,
    ONLINE,
    online_record,
    registered_settings,
    registry_problem,
    store_problem,
    store_settings,
)
from pipeline.stages.refit import REFIT
from pipeline.stages.samples import SAMPLES
from pipeline.stages.validated import VALIDATED
from pipeline.training.checkpoints import Checkpoints
from pipeline.workspace import Workspace
from pipeline.workspace.creation import remove
from pipeline.workspace.registry import CHAMPION as CHAMPION_ALIAS
from pipeline.workspace.registry import PREVIOUS

NOTHING = "nothing"
BUILT = (SAMPLES.name, STATE, USER_AGGREGATES, ITEM_AGGREGATES)
"""Tables that the stage samples builds, partition by partition."""


@dataclass(frozen=True)
class Damage:
    """A damaged piece.

    Attributes:
        file: where it lies.
        holds: what it is.
        problem: as the end of a sentence about the file.
        lost: what is lost with it, for good.
        remedy: what mending does; or, where there is no ``mend``, what the user can do.
        mend: mends it; None where corank cannot.
    """

    file: str
    holds: str
    problem: str
    lost: str
    remedy: str
    mend: Callable[[], None] | None = None


def repair(workspace: Workspace, only_check: bool = False) -> list[Damage]:
    """Check every piece, reading all files, and mend what can be mended; returns what was found, in order.

    The caller holds the workspace's lock. After a kill the same call goes on: all that is made from a piece is marked
    as not made before the piece is removed.
    """
    every: list[Damage] = []
    with workspace.progress.stage("repair") as stage:
        for what, check in CHECKS.items():
            stage.say(f"checking {what}")
            try:
                found = list(check(workspace))
            except CorankError as error:  # caused by a piece found before, or by the user's own data
                found = [Damage(what, "–", f"could not be checked: {error}", "not known", "mend what is named first")]
            for damage in found if not only_check else ():
                if damage.mend is not None:
                    damage.mend()
            every += found
        stage.say(f"{len(CHECKS)} kinds of files checked, {len(every)} damaged")
    return every


# --- records, and what is built from the log -------------------------------------------------------------


def _records(workspace: Workspace) -> Iterator[Damage]:
    records, typed = workspace.records, {stage.name: stage for stage in STAGES}
    for folder, key in records.documents():
        try:
            if folder in typed:
                records.read(typed[folder], key)
            else:
                records.get(folder, key)
        except DamagedRecordError as error:
            lost = {
                "forgotten": "what was erased of this user, and whether all of it was: forget whom you forgot again",
                "types": "of which types the columns were",
            }.get(folder, NOTHING)
            again = {
                "forgotten": "it is removed",
                "types": "it is removed; written again with the next partition that is validated",
            }.get(folder, "it is removed, so that the next run makes again what it stands for")
            yield Damage(
                records.path(folder, key),
                f"record of {folder}",
                f"is not what was written ({error.why})",
                lost,
                again,
                partial(records.remove, folder, key),
            )


def _own_tables(workspace: Workspace) -> Iterator[Damage]:
    for role in workspace.config.tables:
        table = workspace.config.table(role)
        try:
            damaged = damaged_files(table, whole=True) if table.exists() else []
        except UnreadableError as error:  # what is only out of reach now is no damage
            yield Damage(table.uri, f"your table {role}", str(error), "its rows", "restore it from where you wrote it")
            continue
        for file in damaged:
            where = f", partition {file.partition}" if file.partition else ""
            yield Damage(
                f"{table.uri}/{file.path}",
                f"your table {role}{where}",
                file.problem,
                "its rows",
                "restore the file, or write its partition again",
            )


def _derived_tables(workspace: Workspace) -> Iterator[Damage]:
    root = workspace.config.path("tables")
    for table in [*derived_tables(root), Table("quarantine", workspace.config.path("quarantine"))]:
        if not table.exists():
            continue
        stage: Any = VALIDATED if table.name == "quarantine" else SAMPLES
        again = f"{stage.name} of this partition is made again by the next run"
        try:
            lost_files(table)
            damaged = damaged_files(table, whole=True)
        except UnreadableError as error:  # the Delta log: which files belong to the table is not known
            yield Damage(
                f"{table.uri}/_delta_log",
                f"the log of table {table.name}",
                str(error),
                NOTHING,
                f"the table is removed; {stage.name} of all partitions is made again by the next run",
                partial(_remove_table, workspace, table, stage),
            )
            continue
        for file in damaged:
            yield Damage(
                f"{table.uri}/{file.path}",
                f"table {table.name}, partition {file.partition}",
                file.problem,
                NOTHING,
                again,
                partial(_make_again, workspace, stage, str(file.partition)),
            )


def _make_again(workspace: Workspace, stage: Any, partition: str) -> None:
    if record := workspace.records.read(stage, partition):
        workspace.records.write(stage, partition, replace(record, inputs=""))


def _remove_table(workspace: Workspace, table: Table, stage: Any) -> None:
    for partition in workspace.records.all(stage):
        _make_again(workspace, stage, partition)
    store, path = file_system(table.uri)
    store.delete_dir(path)


# --- models ----------------------------------------------------------------------------------------------


def _registry(workspace: Workspace) -> Iterator[Damage]:
    if workspace.config.mlflow_uri:
        return
    path = workspace.config.local_path("mlflow", "mlflow.db")
    verdicts = workspace.records.all(CHAMPION)
    problem = problem_of_database(path) if path.exists() or verdicts else None
    if problem is None and verdicts:
        problem = _contradiction(workspace)
    if problem:
        yield Damage(
            str(path),
            "MLflow's runs, model versions and aliases",
            problem,
            "parameters and tags of runs; versions whose model is gone; what was promoted by hand and never deployed",
            "set aside; versions, metrics and aliases are registered again from the records and the models",
            partial(_make_registry, workspace, path),
        )


def _contradiction(workspace: Workspace) -> str | None:
    """Where the registry contradicts the records."""
    versions = {version.number: version for version in workspace.registry.versions()}
    if not versions:
        return "has no versions, though records name some"
    artifacts = {version: model.artifact for version, model in published_models(workspace).items()}
    for verdict in workspace.records.all(CHAMPION).values():
        version = versions.get(verdict.number)
        if version is None or verdict.model not in artifacts:
            continue
        if (version.tags.get("content"), version.artifact) != (verdict.model, artifacts[verdict.model]):
            return f"says otherwise of version {verdict.number} than its record"
    return None


def _make_registry(workspace: Workspace, path: Path) -> None:
    if path.exists() and (problem_of_database(path) or workspace.registry.versions()):
        path.replace(path.with_name(f"{path.name}.damaged"))
        remove_database(path)
        workspace.close_registry()
    for model in published_models(workspace).values():
        _restore(workspace, Path(model.artifact))
    restore_versions(workspace)
    versions = workspace.registry.versions()
    for copy in workspace.config.local_path("mlflow", "artifacts").glob("*/artifacts/model"):
        run, known = copy.parent.parent, {version.tags.get("content") for version in versions}
        is_former = run.name not in {version.run for version in versions}
        if is_former and problem_of_artifact(copy) is None and version_of(copy) in known:
            remove(run)  # the version has a new run with another copy


def _models(workspace: Workspace) -> Iterator[Damage]:
    root, records, registry = workspace.config.local_path("models"), workspace.records, workspace.registry
    named = {Path(model.artifact) for model in published_models(workspace).values()}
    versions = {Path(version.artifact): version for version in registry.versions()}
    lying = {path for path in root.iterdir() if not path.name.startswith(".")} if root.is_dir() else set()
    for directory in sorted(named | set(versions) | lying):
        problem = problem_of_artifact(directory)
        if problem is None:
            continue
        problem = f"is damaged ({problem})"
        version = versions.get(directory)
        aliases = f" ({', '.join(version.aliases)})" if version and version.aliases else ""
        holds = f"model version {version.number}{aliases}" if version else "a model"
        if _copy_of(workspace, directory):
            restore = partial(_restore, workspace, directory)
            yield Damage(str(directory), holds, problem, NOTHING, "restored from MLflow's copy", restore)
            continue
        current = [records.read(CHALLENGER, CHALLENGER.key(workspace)), records.read(REFIT, REFIT.key(workspace))]
        remedy = "dropped"
        if version and CHAMPION_ALIAS in version.aliases:
            instead = _instead_of(workspace, version.number)
            remedy += f"; version {instead} is champion again" if instead else "; there is no other to be champion"
        if any(record is not None and Path(record.artifact) == directory for record in current):
            lost, remedy = NOTHING, f"{remedy}; `corank run` trains it again"
        else:
            lost = "the model; its data or settings were others"
        yield Damage(str(directory), holds, problem, lost, remedy, partial(_drop, workspace, directory))
    copies = workspace.config.local_path("mlflow", "artifacts")
    for copy in sorted(copies.glob("*/artifacts/model")):
        if problem := problem_of_artifact(copy):
            yield Damage(
                str(copy),
                "MLflow's copy of a model",
                f"is damaged ({problem})",
                NOTHING,
                "copied again from the model, or removed where that is gone",
                partial(_copy_again, workspace, copy),
            )


def _name_of(artifact: Path) -> str | None:
    """Name of the training that an artifact came from, which is also its folder's name; None if it does not say."""
    try:
        return str(read_document(artifact, "lineage")["checkpoint"]).rsplit("/", 1)[-1]
    except (CorankError, KeyError):
        return None


def _copy_of(workspace: Workspace, directory: Path) -> Path | None:
    """An undamaged copy of a model that MLflow keeps with its run, of the version in the model's record, if any."""
    models = published_models(workspace).items()
    known = {version for version, model in models if model.artifact == str(directory)}
    copies = workspace.config.local_path("mlflow", "artifacts").glob("*/artifacts/model")
    whole = (copy for copy in copies if problem_of_artifact(copy) is None and _name_of(copy) == directory.name)
    return next((copy for copy in whole if not known or version_of(copy) in known), None)


def _restore(workspace: Workspace, directory: Path) -> None:
    if problem_of_artifact(directory) and (copy := _copy_of(workspace, directory)):
        _replace(directory, copy)


def _copy_again(workspace: Workspace, copy: Path) -> None:
    sources = {version.artifact for version in workspace.registry.versions() if version.run in copy.parts}
    source = next((Path(candidate) for candidate in sources if problem_of_artifact(candidate) is None), None)
    if source is None:
        remove(copy)
    else:
        _replace(copy, source)


def _replace(directory: Path, source: Path) -> None:
    scratch = directory.with_name(f".{directory.name}.tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(source, scratch)
    if directory.exists():
        remove(directory)
    scratch.rename(directory)


def _drop(workspace: Workspace, directory: Path) -> None:
    """Forget a model that cannot be loaded: another is champion, and whether it is trained again is decided anew."""
    records, registry = workspace.records, workspace.registry
    for version in registry.versions():
        if Path(version.artifact) != directory:
            continue
        if CHAMPION_ALIAS in version.aliases and (instead := _instead_of(workspace, version.number)):
            registry.promote(instead)
        registry.drop(version.number)
    dropped = {version for version, model in published_models(workspace).items() if Path(model.artifact) == directory}
    refits = records.all(REFIT)
    for key, trained in records.all(CHALLENGER).items():
        if trained.version in dropped:
            records.discard(CHALLENGER, key)
            lives_on = any(
                refit.judged == trained.version and refit.version not in dropped for refit in refits.values()
            )
            for other, judged in records.all(EVALUATION).items():
                if judged.model == trained.version and not lives_on:
                    records.discard(EVALUATION, other)
    for key, refit in refits.items():
        if refit.version in dropped:
            records.discard(REFIT, key)
    for key, verdict in records.all(CHAMPION).items():
        if verdict.model in dropped:
            records.discard(CHAMPION, key)
    if directory.exists():
        remove(directory)


def _instead_of(workspace: Workspace, number: int) -> int | None:
    """The version that becomes champion when this one is dropped: the one before it, or else the newest that passed its
    gate, whose files are whole."""
    passed = {verdict.number for verdict in workspace.records.all(CHAMPION).values() if verdict.promoted}
    versions = sorted(
        workspace.registry.versions(), key=lambda version: (PREVIOUS in version.aliases, version.number), reverse=True
    )
    others = (
        version
        for version in versions
        if version.number != number and (PREVIOUS in version.aliases or version.number in passed)
    )
    return next((version.number for version in others if problem_of_artifact(version.artifact) is None), None)


def _checkpoints(workspace: Workspace) -> Iterator[Damage]:
    root = workspace.config.path("checkpoints")
    store, path = file_system(root)
    for training in store.get_file_info(fs.FileSelector(path, allow_not_found=True)):
        of_epochs = Checkpoints(f"{root}/{training.base_name}")
        for checkpoints, lost in ((of_epochs, "an epoch"), (of_epochs.of_steps(), "some steps")):
            for number in checkpoints.damaged():
                yield Damage(
                    checkpoints.folder(number),
                    "a checkpoint of a training",
                    "is damaged or was not finished",
                    f"{lost} of a training, if that has not ended",
                    "removed; a training goes on from the one before",
                    partial(checkpoints.remove, number),
                )


# --- the feature store -----------------------------------------------------------------------------------


def _feature_store(workspace: Workspace) -> Iterator[Damage]:
    record, settings = online_record(workspace), store_settings(workspace)
    if not record.partitions:
        return
    if problem := registry_problem(workspace):
        again = "registered again from the config and the models in use"

        def register() -> None:
            apply(registered_settings(workspace))

        yield Damage(settings.registry, "Feast's registry", problem, NOTHING, again, register)
    where = settings.sqlite_path if settings.online == "sqlite" else settings.redis
    problem = store_problem(workspace, pages=True)
    comparable = record.close is not None and not FEATURE_STORE.stale(workspace) and not SAMPLES.stale(workspace)
    if problem is None and comparable:
        wrong = differing(settings, record.close or 0, record.logged_until or 0)
        if wrong:
            named = ", ".join(f"{count:,} of {view}" for view, count in wrong.items())
            problem = f"does not hold what the tables say: {named}"
    if problem:
        yield Damage(
            where,
            "the online store: profiles, counts and sequences",
            problem,
            "events that were pushed and are in no log",
            "removed; the next run fills it again from the tables",
            partial(_empty_store, workspace),
        )


def _empty_store(workspace: Workspace) -> None:
    workspace.records.write(FEATURE_STORE, ONLINE, replace(online_record(workspace), partitions={}, close=None))
    settings = store_settings(workspace)
    if settings.online == "sqlite":
        remove_database(Path(settings.sqlite_path))


# --- what is for people to look at -----------------------------------------------------------------------


def _dagster(workspace: Workspace) -> Iterator[Damage]:
    home = workspace.config.local_path("dagster")
    aside = home.with_name("dagster.damaged")

    def set_aside() -> None:
        remove(aside)
        home.rename(aside)

    for path in sorted(home.rglob("*.db")):
        if problem := problem_of_database(path):
            yield Damage(
                str(path),
                "Dagster's history of runs",
                problem,
                "the history, which decides nothing",
                f"set aside as {aside.name}; the next run begins another",
                set_aside,
            )
            return  # the whole folder is removed


def _great_expectations(workspace: Workspace) -> Iterator[Damage]:
    for path, problem in damaged_settings(workspace.config.local_path("great_expectations")).items():
        remedy = "removed; the next validation writes it from the config"
        yield Damage(str(path), "settings of Great Expectations", problem, NOTHING, remedy, partial(remove, path))


CHECKS: dict[str, Callable[[Workspace], Iterator[Damage]]] = {
    "records": _records,
    "your tables": _own_tables,
    "derived tables": _derived_tables,
    "model registry": _registry,
    "models": _models,
    "checkpoints": _checkpoints,
    "feature store": _feature_store,
    "Dagster": _dagster,
    "Great Expectations": _great_expectations,
}
"""In order: a check may rely on what earlier ones have mended."""
