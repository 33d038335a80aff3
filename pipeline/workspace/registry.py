"""Runs and models in MLflow: one registered model per pipeline, the alias ``champion`` names what serves."""

from __future__ import annotations

import os
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from features.damage import problem_of_database
from features.errors import CorankError, no_space, writing
from features.schema import Schema
from pipeline.config import Config
from pipeline.workspace.creation import locked, make_whole, plain_path, remove, require_writable

CHAMPION, PREVIOUS = "champion", "previous"

REFUSED, PROMOTED_BY_HAND = "refused", "promoted by hand"
"""Tags of a version: why its gate refused it, and when a user promoted it, one line each."""

TAG_LENGTH = 5_000
"""Most characters of a tag in MLflow."""

WHOLE = int.from_bytes(b"rank")
"""The application_id that marks an SQLite database as whole: it was opened after all its tables were made."""


@dataclass(frozen=True)
class ModelVersion:
    """A registered version. ``number`` counts from 1; ``artifact`` is its directory, ``run`` the id of its run."""

    number: int
    artifact: str
    tags: dict[str, str]
    aliases: tuple[str, ...]
    run: str = ""

    def lineage(self) -> dict[str, Any]:
        """What it was made from.

        Raises:
            CorankError: its artifact cannot be read.
        """
        from models.artifact import read_document

        try:
            return dict(read_document(self.artifact, "lineage"))
        except CorankError as error:
            raise CorankError(
                f"model version {self.number} at {self.artifact}: its lineage cannot be read ({error}), so what it "
                "still needs is unknown. `corank repair` restores the artifact or drops it."
            ) from error


def verdict_tags(evaluation: str, reasons: Sequence[str]) -> dict[str, str]:
    """Tags about a version's verdict: the key of the record, and why it was refused, if it was."""
    return {"evaluation": evaluation, REFUSED: "\n".join(reasons)[:TAG_LENGTH]}


def local_database(folder: Path) -> str:
    """The address of MLflow's database in a folder; it is made when there is none, or a half-made one without content.

    Raises:
        CorankError: it cannot be opened, and what it holds would be lost.
    """
    path = folder / "mlflow.db"
    uri = f"sqlite:///{plain_path(folder) / path.name}"
    with locked(folder / "mlflow.lock"):
        require_writable(path)
        damage = problem_of_database(path) if path.exists() and path.stat().st_size else None
        if damage:
            raise CorankError(
                f"MLflow's database {path} {damage}. Restore it from a backup, or `corank repair`, which makes it "
                "again from the records and the artifacts."
            )
        if path.exists() and not _is_whole(path) and (problem := _problem_of(path)):
            if _may_hold_content(path):
                raise CorankError(
                    f"MLflow's database {path} cannot be opened: {problem}. If another version of MLflow wrote it, "
                    f"`mlflow db upgrade {uri}`; else restore it from a backup, or move it away: the next `corank run` "
                    "makes it again from the records and the artifacts."
                )
            remove(path)
        if not path.exists():
            with writing(path):
                make_whole(path, _open_database)
    return uri


def forget_connections() -> None:
    """Make MLflow open its database anew; it keeps connections by name, even to a file that has gone."""
    from mlflow.store.model_registry import sqlalchemy_store as models
    from mlflow.store.tracking import sqlalchemy_store as runs

    for module in (models, runs):
        for engine in module.SqlAlchemyStore._engine_map.values():
            engine.dispose()


def _open_database(path: Path) -> None:
    """Open a database as MLflow does, which makes its tables, and mark it as whole."""
    from mlflow import MlflowClient

    uri = f"sqlite:///{plain_path(path.parent) / path.name}"
    client = MlflowClient(uri, uri)
    client.search_experiments(max_results=1)
    client.search_registered_models(max_results=1)
    with closing(sqlite3.connect(path)) as database:
        database.execute(f"pragma application_id = {WHOLE}")


def _is_whole(path: Path) -> bool:
    try:
        with closing(sqlite3.connect(path)) as database:
            return bool(database.execute("pragma application_id").fetchone() == (WHOLE,))
    except sqlite3.DatabaseError:
        return False


def _problem_of(path: Path) -> str:
    """Why MLflow cannot open a database; empty if it can, and then the database is marked as whole.

    A copy is opened, as MLflow would migrate the database and keep connections to a file that may be replaced.
    """
    if not path.stat().st_size:
        return "it is empty"
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        copy = Path(shutil.copy(path, folder))
        try:
            _open_database(copy)
        except Exception as error:  # MLflow and its migrations raise any kind of error for a half-made database
            if no_space(error):
                raise
            return f"{type(error).__name__}: {error}".splitlines()[0]
        os.replace(copy, path)
    return ""


def _may_hold_content(path: Path) -> bool:
    """Whether a database that MLflow cannot open has runs or versions, or is too damaged to tell."""
    try:
        with closing(sqlite3.connect(path)) as database:
            tables = {name for (name,) in database.execute("select name from sqlite_master where type = 'table'")}
            return any(
                database.execute(f"select 1 from {table} limit 1").fetchone()
                for table in {"runs", "model_versions"} & tables
            )
    except sqlite3.DatabaseError:
        return True


def published_schema(artifact: str) -> Schema | None:
    """The schema of a published model; None when its artifact is gone, so that nothing can serve it.

    Raises:
        CorankError: it cannot be read.
    """
    try:
        description = yaml.safe_load((Path(artifact) / "model.yaml").read_text(encoding="utf-8"))
        return Schema.model_validate(description["schema"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise CorankError(
            f"model {artifact}: what it reads is unknown, as model.yaml cannot be read ({error}), so nothing can be "
            "registered beside it. `corank repair` restores the artifact or drops it."
        ) from error


class ModelRegistry:
    """The registered model of one pipeline."""

    def __init__(self, config: Config) -> None:
        from pipeline.runtime import quiet

        quiet()
        import mlflow
        from mlflow import MlflowClient

        local = config.local_path("mlflow")
        self.uri = config.mlflow_uri or local_database(local)
        self.name, self.place = config.name, config.mlflow_uri or str(local)
        self._artifacts = None if config.mlflow_uri else (local / "artifacts").as_uri()
        mlflow.set_tracking_uri(self.uri)
        self.client = MlflowClient(self.uri, self.uri)

    def log_run(
        self,
        name: str,
        content: str,
        params: Mapping[str, Any],
        metrics: Mapping[str, float],
        history: Sequence[Mapping[str, Any]],
        files: str,
    ) -> str:
        """Log a finished training as a run with its artifact directory; returns the run id.

        The same content is logged once: a finished run of it is found again.

        Raises:
            NoSpaceError
        """
        size = sum(path.stat().st_size for path in Path(files).iterdir())
        with writing(self.place, size):
            return self._log_run(name, content, params, metrics, history, files)

    def _log_run(
        self,
        name: str,
        content: str,
        params: Mapping[str, Any],
        metrics: Mapping[str, float],
        history: Sequence[Mapping[str, Any]],
        files: str,
    ) -> str:
        from mlflow.entities import Metric, Param

        identity = self._experiment()
        finished = f"tags.content = '{content}' and attributes.status = 'FINISHED'"
        known = self.client.search_runs([identity], finished, max_results=1)
        if known:
            return str(known[0].info.run_id)
        for left in self.client.search_runs(
            [identity], f"tags.content = '{content}' and attributes.status = 'RUNNING'"
        ):
            self.client.set_terminated(left.info.run_id, "KILLED")  # it was killed before it was whole
        run = self.client.create_run(identity, run_name=name, tags={"content": content})
        logged = [Metric(key, float(value), 0, 0) for key, value in metrics.items()]
        for entry in history:
            step = int(entry["epoch"])
            logged += [
                Metric(f"validation/{key}", float(value), 0, step)
                for key, value in entry.items()
                if key != "epoch" and value is not None
            ]
        self.client.log_batch(
            run.info.run_id,
            metrics=logged,
            params=[Param(key, str(value)[:500]) for key, value in params.items()],
        )
        self.client.log_artifacts(run.info.run_id, files, "model")
        self.client.set_terminated(run.info.run_id)
        return str(run.info.run_id)

    @contextmanager
    def training(self, job: str) -> Iterator[Callable[[int, Mapping[str, float]], None]]:
        """A run that shows a training while it goes on; yields what logs the metrics of a step.

        Runs of the same job that were killed are closed.

        Raises:
            NoSpaceError
        """
        from mlflow.entities import Metric

        with writing(self.place):
            identity = self._experiment()
            for left in self.client.search_runs([identity], f"tags.job = '{job}' and attributes.status = 'RUNNING'"):
                self.client.set_terminated(left.info.run_id, "KILLED")
            run = self.client.create_run(identity, run_name=f"training {job}", tags={"job": job}).info.run_id

        def log(step: int, metrics: Mapping[str, float]) -> None:
            now = time.time_ns() // 1_000_000
            with writing(self.place):
                self.client.log_batch(run, [Metric(name, value, now, step) for name, value in metrics.items()])

        status = "FAILED"
        try:
            yield log
            status = "FINISHED"
        finally:
            self.client.set_terminated(run, status)

    def _experiment(self) -> str:
        found = self.client.get_experiment_by_name(self.name)
        if found is not None:
            return str(found.experiment_id)
        return str(self.client.create_experiment(self.name, artifact_location=self._artifacts))

    def log_report(self, run_id: str, path: Path) -> None:
        """Add the report on a model to its run, in the place of an earlier one.

        Raises:
            NoSpaceError
        """
        with writing(self.place, path.stat().st_size):
            self.client.log_artifact(run_id, str(path), "report")

    def register(self, artifact: str, run_id: str, tags: Mapping[str, str]) -> ModelVersion:
        """Register a new version."""
        from mlflow.exceptions import MlflowException

        with writing(self.place):
            try:
                self.client.create_registered_model(self.name)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            created = self.client.create_model_version(self.name, artifact, run_id, tags=dict(tags))
        return self.version(int(created.version))

    def judged(self, number: int, evaluation: str, reasons: Sequence[str]) -> ModelVersion:
        """Name the newest verdict on a version (:func:`verdict_tags`)."""
        for name, value in verdict_tags(evaluation, reasons).items():
            self.client.set_model_version_tag(self.name, str(number), name, value)
        return self.version(number)

    def versions(self) -> list[ModelVersion]:
        """All versions, newest first."""
        found = self.client.search_model_versions(f"name = '{self.name}'")
        names = self.client.get_registered_model(self.name).aliases if found else {}  # a search does not return aliases
        aliases: dict[int, list[str]] = {}
        for alias, number in names.items():
            aliases.setdefault(int(number), []).append(alias)
        versions = [_version(entry, aliases.get(int(entry.version), [])) for entry in found]
        return sorted(versions, key=lambda version: -version.number)

    def version(self, number: int) -> ModelVersion:
        """One version.

        Raises:
            CorankError: there is no such version; lists those there are.
        """
        from mlflow.exceptions import MlflowException

        try:
            entry = self.client.get_model_version(self.name, str(number))
        except MlflowException:
            known = ", ".join(str(version.number) for version in self.versions()) or "none"
            raise CorankError(f"model {self.name} has no version {number}; there are: {known}") from None
        return _version(entry, entry.aliases)

    def champion(self, alias: str = CHAMPION) -> ModelVersion | None:
        """The version that carries the alias, or None."""
        return next((version for version in self.versions() if alias in version.aliases), None)

    def promote(self, number: int) -> ModelVersion:
        """Make a version the champion and remember the one before it."""
        version, before = self.version(number), self.champion()
        with writing(self.place):
            if before is not None and before.number != number:
                self.client.set_registered_model_alias(self.name, PREVIOUS, str(before.number))
            self.client.set_registered_model_alias(self.name, CHAMPION, str(number))
        return version

    def promote_by_hand(self, number: int) -> ModelVersion:
        """Make a version the champion whatever its gate said, and record when, in whose place, and what had failed.

        The tag is written first: after a kill in between, a promotion is recorded and can be repeated.
        """
        version, before = self.version(number), self.champion()
        place = f" in place of version {before.number}" if before is not None else ""
        failed = "; ".join(version.tags.get(REFUSED, "unknown").splitlines()) or "nothing"
        line = f"{datetime.now(UTC).isoformat(timespec='seconds')}{place}, failed: {failed}"
        lines = [*version.tags.get(PROMOTED_BY_HAND, "").splitlines(), line]
        with writing(self.place):
            self.client.set_model_version_tag(self.name, str(number), PROMOTED_BY_HAND, "\n".join(lines)[-TAG_LENGTH:])
        self.promote(number)
        return self.version(number)

    def restore(self, number: int, instead_of: int, why: str) -> ModelVersion:
        """Make a version the champion again instead of one that failed after its promotion, which keeps the reason."""
        with writing(self.place):
            self.client.set_registered_model_alias(self.name, CHAMPION, str(number))
            if self.champion(PREVIOUS) is not None:
                self.client.delete_registered_model_alias(self.name, PREVIOUS)
            self.client.set_model_version_tag(self.name, str(instead_of), "failed live", why[:500])
        return self.version(number)

    def drop(self, number: int) -> None:
        """Forget a version, and the aliases that it carries; its number is not given again."""
        self.client.delete_model_version(self.name, str(number))

    def rollback(self) -> ModelVersion:
        """Make the champion before this one the champion again.

        Raises:
            CorankError: there was none.
        """
        previous = self.champion(PREVIOUS)
        if previous is None:
            raise CorankError(f"model {self.name}: there is no earlier champion to roll back to")
        return self.promote(previous.number)


def _version(entry: Any, aliases: Iterable[str]) -> ModelVersion:
    return ModelVersion(
        int(entry.version), str(entry.source), dict(entry.tags), tuple(sorted(aliases)), str(entry.run_id)
    )
