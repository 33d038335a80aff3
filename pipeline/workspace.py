"""What a workspace holds: the log's partitions, what each stage was made from, what is left to do, and settings.

Every stage is up to date when its record carries the digest of what it would be made from now.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from features.errors import CorankError, DataGateError
from features.records import Records, digest
from pipeline.config import Config
from pipeline.log import Log, close_text
from pipeline.progress import Progress
from pipeline.version import code_version

if TYPE_CHECKING:
    from features.builder.states import BuildSettings
    from features.samples.source import SampleSource
    from features.schema import Schema
    from features.store.online import FeatureStoreSettings
    from pipeline.registry import ModelRegistry, ModelVersion
    from serving.ranking import ServingSettings


DATA_SECTIONS = ("tables", "features", "sequences", "tasks", "grain")
"""Config sections that decide what a partition's rows mean."""

MODEL_SECTIONS = ("features", "sequences", "tasks", "model", "training", "split")
STORE_LAYOUT = 2
"""Version of the views' names and columns; a store of another one is filled anew."""

FOREVER = 2**62
SHOWN_FINDINGS = 20


@dataclass(frozen=True)
class Cuts:
    """Chronological split by request ts: train < validation ≤ … < test ≤ …, microseconds UTC."""

    train: int
    validation: int
    test: int


class Workspace:
    """The workspace of one config.

    Args:
        until: use the log up to this partition; default: the newest closed one.
        warm_start: begin training with the champion, on what came after its own training.
        as_of: a record's lineage: the log is read as it was then, not as it is now.
    """

    def __init__(
        self,
        config: Config,
        progress: Progress,
        until: str | None = None,
        warm_start: bool = False,
        as_of: Mapping[str, Any] | None = None,
    ) -> None:
        self.config, self.progress = config, progress
        self.until, self.warm_start, self.as_of = until, warm_start, as_of
        self.records = Records(config.path("records"))

    @cached_property
    def log(self) -> Log:
        return Log(self.config, self.records, self.until, self.as_of)

    @property
    def partitions(self) -> list[str]:
        return self.log.partitions

    @property
    def trainable(self) -> list[str]:
        """The kept partitions whose labels are all known."""
        return [partition for partition in self.kept if self.log.is_attributed(partition)]

    @property
    def kept(self) -> list[str]:
        """The partitions but for those whose samples retention dropped (pipeline/maintenance.py).

        A retired partition keeps its record, so that it counts as built and nothing rebuilds it.
        """
        records = {partition: self.records.get("samples", partition) or {} for partition in self.partitions}
        return [partition for partition, record in records.items() if not record.get("retired")]

    @cached_property
    def registry(self) -> ModelRegistry:
        from pipeline.registry import ModelRegistry

        return ModelRegistry(self.config)

    @cached_property
    def state_inputs(self) -> dict[str, str]:
        """Per partition the digest of all that its states are made from, the partition before included."""
        from features.builder.states import LAYOUT

        settings = self.config.digest_of(
            *DATA_SECTIONS, "buckets", "log_delay_seconds", "aggregates_delay_seconds", "start"
        )
        chain: dict[str, str] = {}
        previous = ""
        for partition in self.partitions:
            previous = digest([LAYOUT, settings, self.log.fingerprint(partition), previous])
            chain[partition] = previous
        return chain

    @cached_property
    def sample_inputs(self) -> dict[str, str]:
        """Per partition the digest of all that its samples are made from: its states, and labels that came later."""
        return {one: digest([inputs, self.log.labels(one)]) for one, inputs in self.state_inputs.items()}

    def validation_inputs(self, partition: str) -> str:
        settings = self.config.digest_of(*DATA_SECTIONS, "validation")
        return digest([settings, self.log.fingerprint(partition)])

    @property
    def candidate_key(self) -> str:
        """Names the candidate: the newest samples and everything that shapes training. The same for a run
        and a retraining, so that one finds the other's work done."""
        settings = [self.config.digest_of(*MODEL_SECTIONS), self.config.gate_task]
        # retired partitions too: dropping old samples makes no other candidate
        known = [self.sample_inputs[partition] for partition in self.partitions if self.log.is_attributed(partition)]
        return digest([known, settings])

    @property
    def evaluation_key(self) -> str:
        """Names the verdict on the candidate: other limits of the gate judge again without training again."""
        return digest([self.candidate_key, self.config.digest_of("evaluation")])

    def store_inputs(self) -> dict[str, str]:
        """Per partition what the online store should hold."""
        settings = [STORE_LAYOUT, self.config.digest_of("feast", "features", "sequences")]
        return {partition: digest([inputs, settings]) for partition, inputs in self.state_inputs.items()}

    def gone(self, partitions: Iterable[str]) -> list[str]:
        """Those of some partitions that the log, or the config's ``start``, has no more, as far as ``until`` shows."""
        others = [one for one in partitions if one not in self.partitions]
        if self.until is None:
            return others
        return [one for one in others if one <= self.until and one not in self.log.held]

    def stale_validation(self) -> list[str]:
        stale = []
        for partition in self.partitions:
            record = self.records.get("validated", partition)
            if not record or record["inputs"] != self.validation_inputs(partition) or not record["passed"]:
                stale.append(partition)
        return stale

    def stale_samples(self) -> list[str]:
        """The partitions whose inputs changed: all after the first whose rows did, or those whose labels arrived."""
        records = {partition: self.records.get("samples", partition) or {} for partition in self.partitions}
        return [one for one, record in records.items() if record.get("inputs") != self.sample_inputs[one]]

    def stale_store(self) -> list[str]:
        """The partitions to materialise: all after the first that changed, or any when others have gone."""
        record = self.records.get("feature_store", "online") or {}
        stored, wanted = record.get("partitions", {}), self.store_inputs()
        for index, partition in enumerate(self.partitions):
            if stored.get(partition) != wanted[partition]:
                return self.partitions[index:]
        newest = self.partitions[-1]
        if self.gone(stored):
            return [newest]  # what the store holds of later partitions has to go
        # it was filled before the newest counts became known, and now they are
        known = self.log.bounds(newest)[1] + self.config.aggregates_delay
        return [newest] if record["close"] < known <= self.log.now else []

    def pending(self, training: bool = True) -> list[str]:
        """Names of the stages that have work, in order; empty when everything is up to date.

        Args:
            training: with those that train and judge a candidate.
        """
        checks = {
            "validated": bool(self.stale_validation()),
            "samples": bool(self.stale_samples()),
            "feature_store": bool(self.stale_store()),
        }
        if training:
            checks |= {
                "candidate": not self.has_candidate(self.candidate_key),
                "evaluation": self.records.get("evaluation", self.evaluation_key) is None,
                "champion": self.records.get("champion", self.evaluation_key) is None,
            }
        stages = [stage for stage, stale in checks.items() if stale]
        changed = "champion" in stages or "feature_store" in stages or not self.is_deployed()
        return [*stages, "deployment"] if changed else stages

    def has_candidate(self, key: str) -> bool:
        record = self.records.get("candidate", key)
        return record is not None and Path(record["artifact"], "SHA256SUMS").is_file()

    def is_deployed(self) -> bool:
        champion = self.registry.champion()
        record = self.records.get("deployment", "current")
        return champion is not None and record is not None and record["inputs"] == self.deployment_inputs(champion)

    def require_own_features(self, champion: ModelVersion) -> None:
        """
        Raises:
            CorankError: the champion reads other features than the config declares.
        """
        from pipeline.registry import published_schema

        if published_schema(champion.artifact) != self.config.schema_:
            raise CorankError(
                f"champion version {champion.number} reads other features than the config declares, so it cannot be "
                "started with this config; a service that runs is not touched. Start it with the config that it was "
                f"trained with ({champion.artifact}/model.yaml lists its features), or train a version of these "
                "features (`corank run`) or promote one (`corank models promote`)"
            )

    def serves_already(self) -> bool:
        """Whether an endpoint of this pipeline, of another process, answers at the config's address.

        Raises:
            CorankError: something else has the port.
        """
        from serving.client import NoEndpointError, RankingClient
        from serving.ports import endpoint_url, is_free, require_free

        options = self.config.serving
        if is_free(options.host, options.port):
            return False
        try:
            with RankingClient(endpoint_url(options.host, options.port), timeout=10.0) as client:
                model = client.model()["model_version"]
        except NoEndpointError:
            require_free(options.host, options.port)
            return False
        except CorankError:  # it is one, without a model at the moment
            return True
        if model not in [version.tags.get("content") for version in self.registry.versions()]:
            raise CorankError(
                f"serving: an endpoint of another pipeline (model {model}) uses {options.host}:{options.port}. "
                "Set `serving.port` to a free port, or stop it."
            )
        return True

    def deployment_inputs(self, champion: ModelVersion) -> str:
        return digest(
            [champion.number, champion.artifact, self.config.digest_of("serving", "feast", "log_delay_seconds")]
        )

    def lineage(self) -> dict[str, Any]:
        """What every record of a whole log carries: fingerprints, config and code."""
        return {
            "fingerprints": {partition: self.log.fingerprint(partition) for partition in self.partitions},
            "versions": self.log.versions,
            "now": self.log.now,
            "config": self.config.digest_of(*type(self.config).model_fields),
            "code": code_version(),
        }

    def cuts(self) -> Cuts:
        """Cuts in request ts from the counts in the records; reads only the partitions that hold a cut."""
        counts = {partition: self.record("samples", partition)["requests"] for partition in self.trainable}
        if not counts:
            known = self.log.bounds(self.partitions[0])[1] + self.config.schema_.attribution_window
            raise CorankError(
                f"no partition can be trained on yet: the attribution window of {self.partitions[0]} ends at "
                f"{close_text(known)}"
            )
        total = sum(counts.values())
        split = self.config.split
        test_rank = total - round(total * split.test)
        validation_rank = test_rank - round(total * split.validation)
        if validation_rank < 1 or test_rank >= total or test_rank == validation_rank:
            raise CorankError(
                f"{total:,} requests are too few for split.test {split.test} and split.validation {split.validation}; "
                "import more partitions or widen the split"
            )
        return Cuts(
            train=self.log.bounds(next(iter(counts)))[0],
            validation=self._request_ts(counts, validation_rank),
            test=self._request_ts(counts, test_rank),
        )

    def _request_ts(self, counts: dict[str, int], rank: int) -> int:
        """ts of the request of this rank (from 0) in time order."""
        from features.sample_table import request_times

        for partition, count in counts.items():
            if rank < count:
                source = self.source(0, FOREVER, (partition,))
                times = sorted(ts for file in source.files() for ts in request_times(source.read(file)))
                return int(times[rank])
            rank -= count
        raise AssertionError("rank beyond the counted requests")

    def source(self, low: int, high: int, partitions: tuple[str, ...] | None = None) -> SampleSource:
        """Samples of requests with low ≤ ts < high, out of the partitions that can hold them."""
        from features.samples.source import SampleSource

        chosen = partitions or tuple(
            partition
            for partition in self.trainable
            if self.log.bounds(partition)[1] > low and self.log.bounds(partition)[0] < high
        )
        return SampleSource(self.config.path("tables", "samples"), self.config.schema_, chosen, low, high)

    def store_close(self) -> int | None:
        """Up to when the online store knows the log, microseconds UTC; None while it is empty."""
        record = self.records.get("feature_store", "online") or {}
        return record.get("close")

    def build_settings(self, made_of: Mapping[str, Any] | None = None) -> BuildSettings:
        """
        Args:
            made_of: a record; the user's tables are read as they were when it was made. Default: as the log has them.
        """
        from features.builder.states import BuildSettings

        config = self.config
        versions = self.log.versions | ((made_of or {}).get("versions") or {})
        return BuildSettings(
            tables={role: table.at(versions.get(role)) for role, table in self.log.tables.items()},
            schema=config.schema_,
            grain=config.grain,
            buckets=config.buckets,
            log_delay=config.log_delay,
            root=config.path("tables"),
            now=self.log.now,
            aggregates_delay=config.aggregates_delay,
            at_once=config.ray.concurrent_buckets,
        )

    def store_settings(self) -> FeatureStoreSettings:
        from features.delta.table import Table
        from features.store.online import FeatureStoreSettings

        config = self.config
        return FeatureStoreSettings(
            project=config.name,
            registry=str(config.local_path("feast", "registry.db")),
            schema=config.schema_,
            users=self.log.tables.get("users"),
            items=self.log.tables.get("items"),
            events={one.events: self.log.tables[one.events] for one in config.schema_.sequences},
            state_uri=config.path("tables", "state"),
            user_aggregates=Table("user_aggregates", config.path("tables", "user_aggregates")),
            item_aggregates=Table("item_aggregates", config.path("tables", "item_aggregates")),
            online=config.feast.online,
            sqlite_path=str(config.local_path("feast", "online.db")),
            redis=config.feast.redis,
        )

    def registered_settings(self) -> FeatureStoreSettings:
        """The store with all that is registered: what live models read, too, whatever the config declares now."""
        own = self.config.schema_
        return replace(self.store_settings(), live=tuple(one for one in self.live_schemas() if one != own))

    def live_schemas(self) -> list[Schema]:
        """Of the models that are served, or may be from one moment to the next: champion, the one before it, and those
        that were last deployed and last served."""
        from pipeline.registry import PREVIOUS, published_schema

        versions = [self.registry.champion(), self.registry.champion(PREVIOUS)]
        recorded = [self.records.get(stage, "current") for stage in ("deployment", "serving")]
        artifacts = [version.artifact for version in versions if version is not None]
        artifacts += [record["artifact"] for record in recorded if record is not None]
        schemas = [published_schema(artifact) for artifact in dict.fromkeys(artifacts)]
        return [one for one in schemas if one is not None]

    def serving_settings(self, champion: ModelVersion) -> ServingSettings:
        from serving.ranking import ServingSettings

        options = self.config.serving
        return ServingSettings(
            artifact=champion.artifact,
            store=self.store_settings(),
            log_delay=self.config.log_delay,
            max_candidates=options.max_candidates,
            ranker_replicas=options.ranker_replicas,
            service_replicas=options.service_replicas,
            max_batch_requests=options.max_batch_requests,
            batch_wait_ms=options.batch_wait_ms,
            max_ongoing_requests=options.max_ongoing_requests,
            max_queued_requests=options.max_queued_requests,
            max_body_bytes=options.max_body_bytes,
            missing_context=options.missing_context,
        )

    def require_no_gaps(self) -> None:
        gaps = [] if self.config.validation.allow_gaps else self.log.gaps()
        if gaps:
            empty = [f"table impressions, partition {partition}: 0 rows" for partition in gaps]
            raise DataGateError(listed("the log has empty partitions (validation.allow_gaps accepts them)", empty))

    def require_validated(self) -> None:
        self.require_no_gaps()
        refused = self.stale_validation()
        if refused:
            raise DataGateError(
                f"partitions without a passing validation record: {', '.join(refused[:SHOWN_FINDINGS])}. "
                "Run `corank validate` to see why."
            )

    def record(self, stage: str, key: str) -> dict[str, Any]:
        record = self.records.get(stage, key)
        if record is None:
            raise CorankError(f"{stage} has no record for {key}; run `corank run` first")
        return record


def listed(title: str, messages: Sequence[str]) -> str:
    shown = [f"  {message}" for message in messages[:SHOWN_FINDINGS]]
    if len(messages) > SHOWN_FINDINGS:
        shown.append(f"  … and {len(messages) - SHOWN_FINDINGS} more")
    return title + ":\n" + "\n".join(shown)


@contextmanager
def exclusive(config: Config) -> Iterator[None]:
    """One run per workspace at a time; a lock of a killed run is released by the operating system.

    Raises:
        CorankError: another run is working in this workspace.
    """
    import fcntl

    path = config.local_path("run.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CorankError(f"another corank run is working in {path.parent}; wait for it or stop it") from None
        handle.write(str(os.getpid()))
        handle.flush()
        yield
