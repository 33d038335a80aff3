"""The stages that make features of the log: validation, samples, the online store.

Like all stages (:mod:`pipeline.stages`) each does nothing when it is up to date and writes its record last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from features.errors import ConfigError, DataGateError
from pipeline.log import close_text
from pipeline.runtime import ensure_ray
from pipeline.version import code_version
from pipeline.workspace import Workspace, listed

RUN_PARTITIONS = 32
"""Partitions that are built together: what a bucket, and the counts of items, hold in memory meanwhile is theirs."""

UNFINISHED = "unfinished"
"""In place of what a partition was made from, while the online store is being filled with it."""


class DataStages(Workspace):
    """The stages that make features of the log: ``validated``, ``samples`` and ``feature_store``."""

    def validate(self, partitions: Sequence[str]) -> list[dict[str, Any]]:
        """Great Expectations gate. Every verdict is recorded.

        Raises:
            DataGateError: a partition did not pass; every finding is named.
        """
        from features.validation import validate_partitions

        config = self.config
        self.require_no_gaps()
        with self.progress.stage("validated") as stage:
            done = 0

            def said(result: Any) -> None:
                nonlocal done
                done += 1
                stage.say(f"{done}/{len(partitions)} partitions, now {result.partition}")

            results, docs = validate_partitions(
                self.log.tables,
                config.schema_,
                list(partitions),
                config.grain,
                config.validation,
                config.local_path("great_expectations"),
                config.path("quarantine"),
                self.log.now,
                said,
                set(self.partitions) - set(self.log.shown),
            )
            failed = [result for result in results if not result.passed]
            if not failed:  # before the records: with these alone a changed type would pass the next time
                self.log.keep_types(self.records)
            stored = []
            for result in results:
                record = {
                    "inputs": self.validation_inputs(result.partition),
                    "passed": result.passed,
                    "rows": result.rows,
                    "quarantined": result.quarantined,
                    "checks": result.checks,
                    "findings": [asdict(finding) for finding in result.findings],
                    "data_docs": str(docs),
                    "fingerprint": self.log.fingerprint(result.partition),
                    "code": code_version(),
                }
                self.records.put("validated", result.partition, record)
                stored.append(record)
            rows = sum(result.rows.get("impressions", 0) for result in results)
            quarantined = sum(result.quarantined for result in results)
            stage.say(
                f"{len(results) - len(failed)} of {len(results)} partitions pass "
                f"{sum(result.checks for result in results):,} checks; "
                f"{rows:,} impressions, {quarantined:,} quarantined"
            )
            if failed:
                messages = list(dict.fromkeys(finding.message for result in failed for finding in result.failures))
                raise DataGateError(
                    listed(f"{len(failed)} of {len(results)} partitions failed validation", messages)
                    + f"\nData Docs: {docs}"
                )
        return stored

    def build_samples(self, partitions: Sequence[str]) -> dict[str, Any]:
        """Fold partitions into timelines and write their rows.

        Raises:
            CorankError: a partition has no passing validation record.
        """
        from features.builder.build import PartitionCounts, build_partitions

        self.require_validated()
        config = self.config
        with self.progress.stage("samples") as stage:
            stage.say("starting Ray")
            ensure_ray(config.ray)
            settings = self.build_settings()
            stage.say(f"{len(partitions)} partitions, {config.buckets} buckets")
            rows = {partition: self.record("validated", partition)["rows"] for partition in partitions}
            shown = {partition: own.get("impressions", 0) for partition, own in rows.items()}
            counts: dict[str, PartitionCounts] = {}
            for consecutive in self._runs(partitions):
                earlier, which = self.partitions[: self.partitions.index(consecutive[0])], ""
                if len(consecutive) < len(partitions):
                    which = f", partitions {consecutive[0]} … {consecutive[-1]}"
                counts |= build_partitions(
                    settings,
                    consecutive,
                    earlier,
                    shown,
                    lambda what, done, total, which=which: stage.say(f"{done}/{total} {what}{which}"),
                )
                for partition in consecutive:
                    self.records.put(
                        "samples",
                        partition,
                        {
                            "inputs": self.sample_inputs[partition],
                            "fingerprint": self.log.fingerprint(partition),
                            "versions": self.log.versions,
                            "code": code_version(),
                            **asdict(counts[partition]),
                        },
                    )
            total = {
                name: sum(getattr(count, name) for count in counts.values())
                for name in ("impressions", "quarantined", "candidates", "requests", "users", "timeline_events")
            }
            stage.say(
                f"{len(partitions)} partitions: {total['impressions']:,} impressions in = "
                f"{total['candidates']:,} candidates + {total['quarantined']:,} quarantined; "
                f"{total['requests']:,} requests, {total['users']:,} timelines"
            )
        return total

    def _runs(self, partitions: Sequence[str]) -> list[list[str]]:
        """The partitions in runs of consecutive ones, which are committed together."""
        runs: list[list[str]] = []
        for partition in partitions:
            index = self.partitions.index(partition)
            if runs and len(runs[-1]) < RUN_PARTITIONS and self.partitions[index - 1] == runs[-1][-1]:
                runs[-1].append(partition)
            else:
                runs.append([partition])
        return runs

    def fill_store(self, partitions: Sequence[str]) -> dict[str, int]:
        """Feast apply and materialise these partitions into the online store.

        When anything it was filled from has changed or is gone from the log, it is filled anew: what was written must
        go, and the newest row that is left of a user can be as old as the log.

        Raises:
            ConfigError: the store holds later partitions, which are still in the log: it does not go back.
        """
        from features.store.erase import erase_absent
        from features.store.online import apply, materialize

        filled = self.records.get("feature_store", "online") or {}
        stored: dict[str, str] = filled.get("partitions", {})
        inputs, gone = self.store_inputs(), self.gone(stored)
        # what a killed fill brought of later ones goes, as it fills anew
        finished = [one for one, made_from in stored.items() if made_from != UNFINISHED]
        later = [one for one in finished if one > partitions[-1] and one not in gone]
        if later:
            raise ConfigError(
                f"the online store already holds partitions up to {max(later)} and cannot go back to {partitions[-1]}; "
                f"fill it up to {max(later)} or later"
            )
        changed = any(inputs.get(one) != made_from for one, made_from in stored.items())
        index = self.partitions.index(partitions[0])
        anew = changed or index == 0
        # from the close of the partition before: between two, there may be days without any
        start = 0 if anew else self.log.bounds(self.partitions[index - 1])[1]
        close = self.log.bounds(partitions[-1])[1]
        # counts become known some time after the close, by then or by now
        end = max(close, min(close + self.config.aggregates_delay, self.log.now))
        # events of a partition that has gone were logged too, and must not pass for pushed ones
        logged_until = max(close, filled.get("logged_until", filled.get("close", 0)))
        with self.progress.stage("feature_store") as stage:
            stage.say("registering features")
            self._drop_gone_states()
            settings = self.registered_settings()
            apply(settings)
            # a larger table is read by slices, in Ray tasks
            if self.config.ray.address or any(table.size() > settings.slice_bytes for table in settings.tables):
                stage.say("starting Ray")
                ensure_ray(self.config.ray)
            # killed from here on, it is filled anew: nobody knows then what was written
            begun = {"partitions": stored | dict.fromkeys(partitions, UNFINISHED), "logged_until": logged_until}
            self.records.put("feature_store", "online", filled | begun)
            rows = materialize(
                settings, start, end, lambda view, done: stage.say(f"{view}: {done:,} rows"), close, logged_until
            )
            erased = erase_absent(settings, end, close, logged_until) if anew else {}
            self.records.put(
                "feature_store",
                "online",
                {
                    "partitions": {p: made_from for p, made_from in inputs.items() if p <= partitions[-1]},
                    "close": end,
                    "logged_until": close,
                    "rows": rows,
                    **self.lineage(),
                },
            )
            written = ", ".join(f"{count:,} {view}" for view, count in rows.items())
            lost = ", ".join(f"{count:,} {view}" for view, count in erased.items() if count)
            stage.say(
                f"{written} up to {close_text(end)}"
                + (f"; removed, as the log has them no more: {lost}" if lost else "")
            )
        return rows

    def _drop_gone_states(self) -> None:
        """Drop the states of partitions that the log, or the config's ``start``, has no more: the online store is
        filled from these tables. Should they come back, they are built again."""
        from features.builder.states import ITEM_AGGREGATES, STATE, USER_AGGREGATES
        from features.delta.maintenance import drop_partitions

        tables = [self.build_settings().table(name) for name in (STATE, USER_AGGREGATES, ITEM_AGGREGATES)]
        gone = [self.gone(table.partitions()) for table in tables]
        for partition in set().union(*gone):
            if record := self.records.get("samples", partition):
                self.records.put("samples", partition, {**record, "inputs": ""})
        for table, partitions in zip(tables, gone, strict=True):
            if partitions:
                drop_partitions(table, partitions)
