"""Runs and models in MLflow: one registered model per pipeline, the alias ``champion`` names what serves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from features.errors import CorankError
from pipeline.config import Config

CHAMPION, PREVIOUS = "champion", "previous"


@dataclass(frozen=True)
class ModelVersion:
    """A registered version. ``number`` counts from 1; ``artifact`` is its directory."""

    number: int
    artifact: str
    tags: dict[str, str]
    aliases: tuple[str, ...]

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
                "still needs is unknown. Restore the artifact, or promote another version (`corank models list`)."
            ) from error


class ModelRegistry:
    """The registered model of one pipeline."""

    def __init__(self, config: Config) -> None:
        from pipeline.runtime import quiet

        quiet()
        import mlflow
        from mlflow import MlflowClient

        local = config.local_path("mlflow")
        local.mkdir(parents=True, exist_ok=True)
        self.uri = config.mlflow_uri or f"sqlite:///{local}/mlflow.db"
        self.name = config.name
        self._artifacts = None if config.mlflow_uri else f"file://{local}/artifacts"
        mlflow.set_tracking_uri(self.uri)
        self.client = MlflowClient(self.uri, self.uri)

    def log_run(
        self,
        name: str,
        content: str,
        params: Mapping[str, Any],
        metrics: Mapping[str, float],
        history: list[dict[str, float | None]],
        files: str,
    ) -> str:
        """Log a finished training as a run with its artifact directory; returns the run id.

        The same content is logged once: a finished run of it is found again.
        """
        from mlflow.entities import Metric, Param

        experiment = self.client.get_experiment_by_name(self.name)
        identity = (
            experiment.experiment_id
            if experiment
            else self.client.create_experiment(self.name, artifact_location=self._artifacts)
        )
        finished = f"tags.content = '{content}' and attributes.status = 'FINISHED'"
        known = self.client.search_runs([identity], finished, max_results=1)
        if known:
            return str(known[0].info.run_id)
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

    def register(self, artifact: str, run_id: str, tags: Mapping[str, str]) -> ModelVersion:
        """Register a new version."""
        from mlflow.exceptions import MlflowException

        try:
            self.client.create_registered_model(self.name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        created = self.client.create_model_version(self.name, artifact, run_id, tags=dict(tags))
        return self.version(int(created.version))

    def versions(self) -> list[ModelVersion]:
        """All versions, newest first."""
        found = self.client.search_model_versions(f"name = '{self.name}'")
        return sorted((self.version(int(entry.version)) for entry in found), key=lambda version: -version.number)

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
        return ModelVersion(number, str(entry.source), dict(entry.tags), tuple(entry.aliases))

    def champion(self, alias: str = CHAMPION) -> ModelVersion | None:
        """The version that carries the alias, or None."""
        return next((version for version in self.versions() if alias in version.aliases), None)

    def promote(self, number: int) -> ModelVersion:
        """Make a version the champion and remember the one before it."""
        version, before = self.version(number), self.champion()
        if before is not None and before.number != number:
            self.client.set_registered_model_alias(self.name, PREVIOUS, str(before.number))
        self.client.set_registered_model_alias(self.name, CHAMPION, str(number))
        return version

    def rollback(self) -> ModelVersion:
        """Make the champion before this one the champion again.

        Raises:
            CorankError: there was none.
        """
        previous = self.champion(PREVIOUS)
        if previous is None:
            raise CorankError(f"model {self.name}: there is no earlier champion to roll back to")
        return self.promote(previous.number)
