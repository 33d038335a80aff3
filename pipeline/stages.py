"""The stages of the DAG, from a log partition to a verified deployment.

    log_partition → validated → samples → feature_store → candidate → evaluation → champion → deployment

Each does nothing when it is up to date (:mod:`pipeline.workspace`) and writes its record last, so a killed run
continues where it stopped and ends the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from features.errors import ConfigError, CorankError, DataGateError
from pipeline.config import EvaluationConfig
from pipeline.log import close_text
from pipeline.runtime import ensure_ray, quiet
from pipeline.version import code_version
from pipeline.workspace import FOREVER, Cuts, Workspace, listed

RUN_PARTITIONS = 32
"""Partitions that are built together: what a bucket, and the counts of items, hold in memory meanwhile is theirs."""

UNFINISHED = "unfinished"
"""In place of what a partition was made from, while the online store is being filled with it."""


class Pipeline(Workspace):
    """The stages of one config, run on its workspace."""

    def validate(self, partitions: Sequence[str]) -> list[dict[str, Any]]:
        """Great Expectations gate. Every verdict is recorded.

        Raises:
            DataGateError: a partition did not pass; every finding is named.
        """
        from features.validation import validate_partitions

        config = self.config
        tables = {role: config.table(role) for role in config.tables}
        self.require_no_gaps()
        with self.progress.stage("validated") as stage:
            done = 0

            def said(result: Any) -> None:
                nonlocal done
                done += 1
                stage.say(f"{done}/{len(partitions)} partitions, now {result.partition}")

            results, docs = validate_partitions(
                tables,
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
            failed = [result for result in results if not result.passed]
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
        self.log.keep_types(self.records)
        return stored

    def build_samples(self, partitions: Sequence[str]) -> dict[str, Any]:
        """Fold partitions into timelines and write their rows.

        Raises:
            CorankError: a partition has no passing validation record.
        """
        from features.samples import PartitionCounts, build_partitions

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
            settings = self.store_settings()
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
        from features.maintenance import drop_partitions
        from features.states import ITEM_AGGREGATES, STATE, USER_AGGREGATES

        tables = [self.build_settings().table(name) for name in (STATE, USER_AGGREGATES, ITEM_AGGREGATES)]
        gone = [self.gone(table.partitions()) for table in tables]
        for partition in set().union(*gone):
            if record := self.records.get("samples", partition):
                self.records.put("samples", partition, {**record, "inputs": ""})
        for table, partitions in zip(tables, gone, strict=True):
            if partitions:
                drop_partitions(table, partitions)

    def train_candidate(self) -> dict[str, Any]:
        """Train on all partitions, or from the champion on what came after its training."""
        from models.artifact import save_artifact
        from pipeline.selfcheck import selfcheck_document
        from pipeline.training import TrainingJob, number_statistics, train

        self.require_validated()
        config, key = self.config, self.candidate_key
        with self.progress.stage("candidate") as stage:
            stage.say("preparing")
            ensure_ray(config.ray)
            cuts = self.cuts()
            champion = self.registry.champion() if self.warm_start else None
            weights, low = None, cuts.train
            statistics: dict[str, tuple[float, float]] | None = None
            if champion is not None:
                from models.artifact import load_artifact
                from models.profile import on_meta

                artifact = load_artifact(champion.artifact)
                if artifact.schema != config.schema_:
                    raise CorankError(
                        f"retraining starts from model version {champion.number}, whose features differ from the "
                        "config's; train from scratch with `corank run`"
                    )
                own = on_meta(config.schema_, config.model.name, config.model.preset, **config.model.overrides)
                same = [model.describe() | {"dropout": None} for model in (artifact.model, own)]
                if same[0] != same[1]:
                    raise CorankError(
                        f"retraining starts from model version {champion.number}, whose model or sizes differ from "
                        "the config's `model:`; train from scratch with `corank run`"
                    )
                weights, statistics = artifact.model.state_dict(), {}
                low = int(artifact.metadata["lineage"]["cuts"]["validation"])
            train_source = self.source(low, cuts.validation)
            job = TrainingJob(
                name=f"{config.name}-{key[:12]}" + (f"-from-{champion.number}" if champion else ""),
                schema=config.schema_,
                model=config.model,
                training=config.training,
                train=train_source,
                validation=self.source(cuts.validation, cuts.test),
                statistics=number_statistics(train_source) if statistics is None else statistics,
                gate_task=config.gate_task,
                warm_start=weights,
            )

            def said(report: Any) -> None:
                score = report.get(f"{config.gate_task}_auc")
                metric = f", validation AUC {score:.4f}" if score is not None else ""
                stage.say(
                    f"epoch {report['epoch']}/{config.training.epochs}, {report['candidates']:,} candidates{metric}"
                )

            result = train(job, config.path("checkpoints"), said, elastic=config.ray.address is not None)
            lineage = {
                "pipeline": config.name,
                # those whose samples it was made from: retention keeps them while the model is live
                "partitions": {
                    partition: self.sample_inputs[partition]
                    for partition in self.trainable
                    if self.log.bounds(partition)[1] > low
                },
                **self.lineage(),
                "cuts": asdict(cuts),
                "trained_from": low,
                "warm_start": champion.number if champion else None,
                "seed": config.training.seed,
                "checkpoint": f"{config.path('checkpoints')}/{job.name}",
            }
            directory = config.local_path("models", job.name)
            version = save_artifact(
                directory,
                result.model,
                {
                    "lineage": lineage,
                    "metrics": {"validation": result.history},
                    "selfcheck": selfcheck_document(result.model, self.source(cuts.test, FOREVER)),
                },
            )
            record = {"artifact": str(directory), "version": version, "history": result.history, **lineage}
            self.records.put("candidate", key, record)
            best = max(result.history, key=lambda entry: entry.get(f"{config.gate_task}_auc", 0.0))
            stage.say(
                f"model {version}, {len(result.history)} epochs of {best['candidates']:,} candidates, "
                f"best validation AUC {best.get(f'{config.gate_task}_auc', float('nan')):.4f} in epoch {best['epoch']}"
            )
        return record

    def evaluate(self) -> dict[str, Any]:
        """Judge the candidate on the held-out newest requests, beside the baseline and the champion."""
        from models.artifact import load_artifact
        from pipeline.evaluation import baseline, report, score_source
        from pipeline.report import write_report

        config, key = self.config, self.candidate_key
        candidate = self.record("candidate", key)
        cuts = Cuts(**candidate["cuts"])
        with self.progress.stage("evaluation") as stage:
            stage.say("scoring held-out requests")
            ensure_ray(config.ray)
            test, options = self.source(cuts.test, FOREVER), config.training
            budget = (4 * options.batch_candidates, 4 * options.batch_events)
            scored = score_source(candidate["artifact"], test, *budget)
            champion = self.registry.champion()
            rival = None
            if champion is not None and champion.artifact != candidate["artifact"]:
                if load_artifact(champion.artifact).schema == config.schema_:
                    stage.say(f"scoring champion version {champion.number}")
                    rival = score_source(champion.artifact, test, *budget)
                else:
                    self.progress.note(f"champion version {champion.number} reads other features: not compared")
            stage.say("fitting the baseline")
            everything = self.source(0, FOREVER)
            baselines = {
                task.name: baseline(everything, task, cuts.test, config.log_delay) for task in config.schema_.tasks
            }
            reports = report(config.schema_, scored, baselines, rival, config.evaluation.resamples)
            gate = reports[config.gate_task]
            against = (champion.number, gate.champion_gain[0]) if champion and gate.champion_gain else None
            reasons = gate_reasons(config.evaluation, gate.gain[0], against)
            record = {
                "model": candidate["version"],
                "tasks": {name: entry.as_dict() for name, entry in reports.items()},
                "impressions": len(scored.scores),
                "passed": not reasons,
                "reasons": reasons,
                "champion": champion.number if rival is not None and champion else None,
                **self.lineage(),
            }
            record["report"] = write_report(config.local_path("reports"), config, candidate, record)
            self.records.put("evaluation", self.evaluation_key, record)
            low, high = gate.gain[1:]
            stage.say(
                f"{len(scored.scores):,} impressions: {config.gate_task} AUC {gate.metrics.auc:.4f} against "
                f"{gate.baseline.auc:.4f} of the baseline "
                f"(difference {gate.gain[0]:+.4f}, 95 % {low:+.4f} … {high:+.4f})"
            )
        return record

    def promote(self) -> dict[str, Any]:
        """Register the candidate in MLflow; it becomes champion when it passed the gate.

        Raises:
            CorankError: it did not pass and there is no champion to keep.
        """
        key = self.candidate_key
        candidate, evaluation = self.record("candidate", key), self.record("evaluation", self.evaluation_key)
        with self.progress.stage("champion") as stage:
            stage.say("registering in MLflow")
            registry = self.registry
            metrics = {
                f"test/{task}_{name}": value
                for task, entry in evaluation["tasks"].items()
                for name, value in entry.items()
                if isinstance(value, float)
            }
            known = [v for v in registry.versions() if v.tags.get("content") == candidate["version"]]
            if known:
                version = known[0]
            else:
                flat = {
                    f"{section}.{name}": value
                    for section in ("model", "training", "split")
                    for name, value in self.config.model_dump(mode="json")[section].items()
                }
                run = registry.log_run(
                    f"{self.config.name}-{candidate['version']}",
                    candidate["version"],
                    {**flat, "partitions": f"{self.partitions[0]} … {self.partitions[-1]}", "code": candidate["code"]},
                    metrics,
                    candidate["history"],
                    candidate["artifact"],
                )
                tags = {
                    "content": candidate["version"],
                    "evaluation": self.evaluation_key,
                    "partition": self.partitions[-1],
                    "trained": max(candidate["partitions"]),
                }
                version = registry.register(candidate["artifact"], run, tags)
            if evaluation["passed"]:
                registry.promote(version.number)
                outcome = f"version {version.number} is champion"
            else:
                outcome = f"version {version.number} not promoted: " + "; ".join(evaluation["reasons"])
            record = {
                "number": version.number,
                "model": candidate["version"],
                "promoted": evaluation["passed"],
                "outcome": outcome,
                **self.lineage(),
            }
            self.records.put("champion", self.evaluation_key, record)
            stage.say(outcome)
        if registry.champion() is None:
            raise CorankError(
                f"model {outcome}, and there is no champion to serve. See the report {evaluation['report']}; "
                "change the config or the gate (`evaluation`), then run again."
            )
        return record

    def deploy(self) -> dict[str, Any]:
        """Start the endpoint with the champion, verify its answers over HTTP, and record the version.

        Raises:
            CorankError: it does not start, or its scores differ from the offline scores.
        """
        from models.artifact import load_artifact
        from pipeline.verification import verify_endpoint
        from serving.deploy import start

        quiet()
        champion = self.registry.champion()
        if champion is None:
            raise CorankError("there is no champion to deploy; `corank run` trains one")
        config = self.config
        if load_artifact(champion.artifact).schema != config.schema_:
            raise CorankError(
                f"champion version {champion.number} reads other features than the config declares, so it cannot be "
                "served with them; train one of these features (`corank run`), promote one or restore the config"
            )
        with self.progress.stage("deployment") as stage:
            stage.say(f"starting Ray Serve with model version {champion.number}")
            ensure_ray(config.ray)
            url = start(self.serving_settings(champion), config.serving.host, config.serving.port)
            stage.say("comparing its answers with offline scores")
            stored = self.record("feature_store", "online")  # of later partitions than ``until``, too
            partitions, close = sorted(stored["partitions"]), int(stored["close"])
            verified = verify_endpoint(url, champion.artifact, self.build_settings(), partitions, close)
            record = {
                "inputs": self.deployment_inputs(champion),
                "number": champion.number,
                "model": champion.tags.get("content", ""),
                "artifact": champion.artifact,
                "url": url,
                "verified": verified,
                **self.lineage(),
            }
            self.records.put("deployment", "current", record)
            stage.say(
                f"version {champion.number} at {url}, {verified['requests']} requests over HTTP equal offline scores "
                f"within {verified['largest_difference']:.1e}"
            )
        return record


def gate_reasons(limits: EvaluationConfig, gain: float, against: tuple[int, float] | None) -> list[str]:
    """Why a candidate is not promoted; empty when it passes. A difference that is no number does not pass.

    Args:
        gain: AUC minus the baseline's.
        against: version of the champion and AUC minus its AUC, or None without one.
    """
    reasons = []
    if not gain >= limits.min_gain_over_baseline:
        reasons.append(f"AUC gain over the baseline {gain:+.4f} is below {limits.min_gain_over_baseline:+.4f}")
    if against is not None and not against[1] >= -limits.max_loss_against_champion:
        reasons.append(
            f"AUC {against[1]:+.4f} against champion version {against[0]} loses more than "
            f"{limits.max_loss_against_champion:.4f}"
        )
    return reasons
