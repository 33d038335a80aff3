"""The one YAML file: the user's tables, the features, the model and how to train and serve it.

``Config`` is checked whole before anything starts. Any key can be overridden by an environment variable,
``CORANK_`` plus the path of the key joined by double underscores: ``CORANK_TRAINING__EPOCHS=2``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from features.delta.paths import check_openable
from features.delta.table import Table
from features.digest import digest
from features.errors import ConfigError, allowed_keys, explain
from features.schema import FEEDBACK, Declaration, Feature, Grain, Name, Schema, Sequence, Task, partition_bounds
from features.validation import ValidationRules
from models.config import ModelConfig
from pipeline.evaluation.settings import EvaluationConfig
from pipeline.runtime import RayConfig
from pipeline.training.settings import HoldoutConfig, RetrainingConfig, TrainingConfig
from pipeline.trigger import TriggerConfig
from serving.settings import ServingConfig

PROFILES: tuple[Literal["users", "items"], ...] = ("users", "items")
"""The roles of profile tables; each is optional, and so is its column ``updated_at``."""

ENVIRONMENT_PREFIX = "CORANK_"
RESERVED_VARIABLES = {"CORANK_CONFIG", "CORANK_TOKEN"}


class PartitionConfig(Declaration):
    """What a log is partitioned by; profile tables have no partitions."""

    column: str | None = Field(
        None,
        description="the table's partition column, or ts: partitions are cut from the rows' times, whatever the table "
        "is partitioned by. Default: dt where it is partitioned by that, else ts",
    )


class TableConfig(Declaration):
    """One of the user's own Delta tables; corank never modifies it."""

    path: str = Field(description="local folder or s3:// address of the Delta table")
    columns: dict[str, str] = Field({}, description="corank's name: the table's own column name")
    partition: PartitionConfig = PartitionConfig()
    storage_options: dict[str, str] = Field({}, description="credentials and endpoint for s3://")

    @field_validator("path")
    @classmethod
    def _path_can_be_opened(cls, path: str) -> str:
        check_openable(_absolute(path))
        return path

    @model_validator(mode="after")
    def _partition_columns_keep_their_names(self) -> TableConfig:
        if "dt" in self.columns:
            raise ValueError(f"columns: dt cannot be mapped; write `partition: {{column: {self.columns['dt']}}}`")
        if "bucket" in self.columns:
            raise ValueError("columns: bucket cannot be mapped; a partition column must be called so")
        return self


class RetentionConfig(Declaration):
    partitions: int | None = Field(
        None,
        ge=1,
        description="newest partitions of the sample table to keep; default: all. See `corank features retain`",
    )


class FeastConfig(Declaration):
    online: Literal["sqlite", "redis"] = "sqlite"
    redis: str = Field("localhost:6379", description="host:port of Redis, when online is redis")


class Config(Declaration):
    """Everything one pipeline needs to know."""

    former_keys: ClassVar[Mapping[str, str]] = {
        "split": "holdout, and takes partitions, a duration or a share: {test: 1 partition, validation: 0.1}"
    }

    name: Name = Field(description="name of the pipeline; also of its registered model")
    workspace: str = Field(description="where corank writes: a local folder or s3:// prefix")
    local: str | None = Field(None, description="local folder for SQLite files; default: the workspace")
    grain: Grain = Field(description="length of one log partition")
    buckets: int = Field(4, ge=1, le=4096, description="user-hash buckets; memory is bounded by one of them")
    log_delay_seconds: float = Field(0.0, ge=0, description="a request sees events older than this")
    aggregates_delay_seconds: float = Field(
        0.0, ge=0, description="after a partition's close, until its aggregates are known"
    )
    start: str | None = Field(None, description="first partition to use; default: the oldest")
    tables: dict[str, TableConfig] = Field(description="impressions, users, items and the event tables")
    features: tuple[Feature, ...]
    sequences: tuple[Sequence, ...]
    tasks: tuple[Task, ...]
    holdout: HoldoutConfig = HoldoutConfig()
    validation: ValidationRules = ValidationRules()
    model: ModelConfig = ModelConfig()
    training: TrainingConfig = TrainingConfig()
    retraining: RetrainingConfig = RetrainingConfig()
    trigger: TriggerConfig = TriggerConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    serving: ServingConfig = ServingConfig()
    feast: FeastConfig = FeastConfig()
    retention: RetentionConfig = RetentionConfig()
    ray: RayConfig = RayConfig()
    mlflow_uri: str | None = Field(None, description="tracking server; default: SQLite in the local folder")

    @field_validator("workspace")
    @classmethod
    def _workspace_can_be_opened(cls, path: str) -> str:
        check_openable(_absolute(path))
        return path

    @model_validator(mode="after")
    def _parts_fit_together(self) -> Config:
        schema = self.schema_  # checks features, sequences and tasks against each other
        if "impressions" not in self.tables:
            raise ValueError(f"tables: impressions is missing; there are {sorted(self.tables)}")
        for role in PROFILES:
            columns = schema.profile_columns(role)
            if columns and role not in self.tables:
                raise ValueError(f"tables: {role} is missing, and features read its columns {', '.join(columns)}")
        for feature in schema.aggregates("user", "item", "cross"):
            of = feature.aggregate.of if feature.aggregate else ""
            logs = sorted(set(self.tables) - {*PROFILES, FEEDBACK})  # late labels are no log of their own time
            if of not in logs:
                raise ValueError(
                    f"features: {feature.name} counts the rows of {of!r}, but tables has only the logs {logs}"
                )
        if schema.delayed_tasks and FEEDBACK not in self.tables:
            raise ValueError(
                f"tasks: {schema.delayed_tasks[0].name} has an attribution window, so its labels come from the table "
                f"feedback, but tables has only {sorted(self.tables)}"
            )
        for sequence in schema.sequences:
            if sequence.events not in self.tables:
                raise ValueError(
                    f"sequences: {sequence.name} reads the events {sequence.events!r}, "
                    f"but tables has only {sorted(self.tables)}"
                )
        try:
            self.model.check_fit(schema)
        except ValueError as error:
            raise ValueError(f"model: {error}") from None
        task = self.evaluation.task
        if task is not None and task not in [known.name for known in schema.tasks]:
            raise ValueError(f"evaluation.task {task!r} is none of the tasks {[t.name for t in schema.tasks]}")
        unknown = [role for role in self.trigger.wait_for or () if role not in schema.logs]
        if unknown:
            raise ValueError(f"trigger.wait_for: {unknown[0]!r} is none of the logs {list(schema.logs)}")
        strange = [name for name in self.serving.weights if name not in [known.name for known in schema.tasks]]
        if strange:
            raise ValueError(f"serving.weights: {strange[0]!r} is none of the tasks {[t.name for t in schema.tasks]}")
        if self.start is not None:
            try:
                partition_bounds(self.start, self.grain)
            except ValueError as error:
                raise ValueError(f"start: {error}") from None
        if "://" in self.workspace and self.local is None:
            raise ValueError("local: a workspace on s3:// needs a local folder for SQLite files")
        return self

    @property
    def schema_(self) -> Schema:
        return Schema(features=self.features, sequences=self.sequences, tasks=self.tasks)

    @property
    def log_delay(self) -> int:
        """Microseconds."""
        return round(self.log_delay_seconds * 1e6)

    @property
    def aggregates_delay(self) -> int:
        """Microseconds."""
        return round(self.aggregates_delay_seconds * 1e6)

    @property
    def gate_task(self) -> str:
        return self.evaluation.task or self.tasks[0].name

    def table(self, role: str) -> Table:
        """One of the user's tables, at its newest version.

        Columns that a log or a profile table may lack are made: an event's id, and since when a profile is true.
        """
        declared = self.tables[role]
        is_profile = role in PROFILES
        makes = ("updated_at",) if is_profile else () if role in ("impressions", FEEDBACK) else ("event_id",)
        return Table(
            role,
            _absolute(declared.path),
            declared.columns,
            declared.storage_options,
            grain=None if is_profile else self.grain,
            partition=None if is_profile else declared.partition.column,
            makes=makes,
        )

    def path(self, *parts: str) -> str:
        """A path below the workspace (may be s3://)."""
        return "/".join([_absolute(self.workspace).rstrip("/"), *parts])

    def local_path(self, *parts: str) -> Path:
        """A path below the local folder."""
        return Path(_absolute(self.local or self.workspace)).joinpath(*parts)

    def digest_of(self, *sections: str, stored: bool = False) -> str:
        """Digest of these top-level sections alone, so that other keys re-run nothing.

        Credentials and CPU reservations change no result, so they are left out.

        Args:
            stored: of features only those that tables store: without the ones of the visible history.
        """
        content = self.model_dump(mode="json", exclude={"training": {"cpus_per_worker"}})
        for table in content["tables"].values():
            del table["storage_options"]
        if stored:
            plain = [feature for feature in content["features"] if feature["history"] is None]
            content["features"] = [{k: value for k, value in feature.items() if k != "history"} for feature in plain]
        return digest({section: content[section] for section in sections})


def _absolute(path: str) -> str:
    return path if "://" in path else str(Path(path).expanduser().resolve())


class _Scalars(yaml.SafeLoader):
    """YAML whose scalars are read as text: NO, 012 and 2026-01-05 are no boolean, octal number or date. The declaration
    of a key decides whether its value is a number or a boolean."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - as PyYAML has it
        first: [
            resolver for resolver in resolvers if resolver[0] in ("tag:yaml.org,2002:null", "tag:yaml.org,2002:merge")
        ]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_sequence_node(self, anchor: Any) -> yaml.SequenceNode:
        """In a list every scalar is text, also NULL and ~; only a key can lack a value."""
        node: yaml.SequenceNode = super().compose_sequence_node(anchor)
        for child in node.value:
            if isinstance(child, yaml.ScalarNode) and child.value:
                child.tag = "tag:yaml.org,2002:str"
        return node


def _scalars_as_written(text: str) -> Any:
    return yaml.load(text, _Scalars)


def load_config(path: str | Path) -> Config:
    """Read, override from the environment, and check a config file.

    Raises:
        ConfigError: names the file, each wrong key, its value and what is allowed.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"config {path}: no such file. The examples lie in pipeline/examples.")
    try:
        content = _scalars_as_written(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"config {path}: is not UTF-8 (byte {error.start}); save it as UTF-8") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"config {path}: not valid YAML: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"config {path}: expected keys and values, found {type(content).__name__}")
    for variable, value in sorted(os.environ.items()):
        if variable.startswith(ENVIRONMENT_PREFIX) and variable not in RESERVED_VARIABLES:
            _override(content, variable, value)
    try:
        return Config.model_validate(content)
    except ValidationError as error:
        lines = [explain(problem, Config, "(whole file)") for problem in error.errors()]
        raise ConfigError(f"config {path}:\n" + "\n".join(f"  {line}" for line in lines)) from None


def _override(content: dict[str, Any], variable: str, value: str) -> None:
    keys = variable.removeprefix(ENVIRONMENT_PREFIX).lower().split("__")
    if keys[0] not in Config.model_fields:
        raise ConfigError(
            f"environment variable {variable}: {keys[0]!r} is no key of the config. {allowed_keys(keys[0], Config)}"
        )
    node: Any = content
    try:
        for key in keys[:-1]:
            node = node.setdefault(key, {}) if isinstance(node, dict) else node[int(key)]
        node[keys[-1] if isinstance(node, dict) else int(keys[-1])] = _scalars_as_written(value)
    except (ValueError, TypeError, IndexError, AttributeError):
        raise ConfigError(
            f"environment variable {variable}: the config has nothing at {'.'.join(keys)} to override "
            "(elements of a list are named by their number, from 0)"
        ) from None
    except yaml.YAMLError:
        raise ConfigError(f"environment variable {variable}: {value!r} is not valid YAML") from None
