"""The stages of the DAG, from a log partition to a verified deployment.

    log_partition → validated → samples → feature_store → candidate → evaluation → champion → deployment

Each does nothing when it is up to date (:mod:`pipeline.workspace`) and writes its record last, so a killed run
continues where it stopped and ends the same.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from features.errors import CorankError
from pipeline.config import EvaluationConfig
from pipeline.data_stages import DataStages
from pipeline.log import close_text
from pipeline.progress import Eta
from pipeline.runtime import ensure_ray, quiet
from pipeline.workspace import FOREVER, Cuts

if TYPE_CHECKING:
    from pipeline.progress import Stage
    from pipeline.registry import ModelVersion


class Pipeline(DataStages):
    """The stages of one config, run on its workspace."""

    def train_candidate(self) -> dict[str, Any]:
        """Train on all partitions, or from the champion on what came after its training.

        Raises:
            CorankError: there is nothing to train on or to judge by, or training met what is not finite.
        """
        from models.artifact import save_artifact
        from pipeline.selfcheck import selfcheck_document
        from pipeline.training import TrainingJob, require_both_classes, summarize, train

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
            train_source, validation, test = (
                self.source(*span)
                for span in ((low, cuts.validation), (cuts.validation, cuts.test), (cuts.test, FOREVER))
            )
            require_both_classes(config.gate_task, "test", summarize(test), "Widen `split.test`")
            require_both_classes(config.gate_task, "validation", summarize(validation), "Widen `split.validation`")
            summary = summarize(train_source)
            if not summary.candidates:
                raise CorankError(
                    f"no requests to train on between {close_text(low)} and {close_text(cuts.validation)}; take more "
                    "partitions or narrow `split`"
                )
            pace = config.training.pace(summary.candidates)
            job = TrainingJob(
                name=f"{config.name}-{key[:12]}" + (f"-from-{champion.number}" if champion else ""),
                schema=config.schema_,
                model=config.model,
                training=config.training,
                pace=pace,
                train=train_source,
                validation=validation,
                statistics=summary.numbers if statistics is None else statistics,
                gate_task=config.gate_task,
                warm_start=weights,
            )

            eta, epochs = Eta(), config.training.epochs

            def said(report: Any) -> None:
                if "note" in report:
                    self.progress.note(report["note"])
                    return
                score = report.get(f"{config.gate_task}_auc")
                metric = f", validation AUC {score:.4f}" if score is not None else ""
                done = (report["epoch"] - 1) * pace.candidates + report["candidates"]
                speed = eta.tell(done, epochs * pace.candidates, "candidates")
                stage.say(
                    f"epoch {report['epoch']}/{epochs}, {report['candidates']:,} of {pace.candidates:,} candidates"
                    f"{speed}{metric}"
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
                "pace": asdict(pace),
                "checkpoint": f"{config.path('checkpoints')}/{job.name}",
            }
            directory = config.local_path("models", job.name)
            version = save_artifact(
                directory,
                result.model,
                {
                    "lineage": lineage,
                    "metrics": {"validation": result.history},
                    "selfcheck": selfcheck_document(result.model, test),
                },
            )
            record = {"artifact": str(directory), "version": version, "history": result.history, **lineage}
            self.records.put("candidate", key, record)
            best = max(result.history, key=lambda entry: entry[f"{config.gate_task}_auc"] or 0.0)
            stage.say(
                f"model {version}, {len(result.history)} epochs of {best['candidates']:,} candidates, "
                f"best validation AUC {best[f'{config.gate_task}_auc']:.4f} in epoch {best['epoch']}"
            )
        return record

    def evaluate(self) -> dict[str, Any]:
        """Judge the candidate on the held-out newest requests, beside the baseline and the champion.

        Raises:
            CorankError: of the gate's task there is no AUC, or a score is not finite.
        """
        import numpy as np

        from models.artifact import load_artifact
        from models.metrics import require_finite
        from pipeline.evaluation import baseline, report, score_source
        from pipeline.report import write_report

        config, key = self.config, self.candidate_key
        candidate = self.record("candidate", key)
        cuts = Cuts(**candidate["cuts"])
        with self.progress.stage("evaluation") as stage:
            stage.say("scoring held-out requests")
            ensure_ray(config.ray)
            test, options = self.source(cuts.test, FOREVER), config.training
            budget = (4 * candidate["pace"]["batch_candidates"], 4 * options.batch_events)
            scored = score_source(candidate["artifact"], test, *budget)
            require_finite(f"scores of candidate {candidate['version']}", scored.scores)
            champion = self.registry.champion()
            rival = None
            if champion is not None and champion.artifact != candidate["artifact"]:
                if load_artifact(champion.artifact).schema == config.schema_:
                    stage.say(f"scoring champion version {champion.number}")
                    rival = score_source(champion.artifact, test, *budget)
                    if not np.isfinite(rival.scores).all():  # no reason to keep it
                        self.progress.note(f"champion version {champion.number} gives scores that are not finite")
                        rival = None
                else:
                    self.progress.note(f"champion version {champion.number} reads other features: not compared")
            stage.say("fitting the baseline")
            everything = self.source(0, FOREVER)
            baselines = {
                task.name: baseline(everything, task, cuts.test, config.log_delay) for task in config.schema_.tasks
            }
            reports = report(config.schema_, scored, baselines, rival, config.evaluation.resamples)
            gate = reports[config.gate_task]
            if gate.gain is None:
                raise CorankError(
                    f"task {config.gate_task}, which the gate judges by: its labels in the test set, or those before "
                    "it for the baseline, have not both classes. Widen `split.test`, take more partitions, or name "
                    "another task in `evaluation.task`"
                )
            against = (champion.number, gate.champion_gain.difference) if champion and gate.champion_gain else None
            reasons = gate_reasons(config.evaluation, gate.gain.difference, against)
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
            stage.say(
                f"{len(scored.scores):,} impressions: {config.gate_task} AUC {gate.metrics.auc:.4f}, "
                f"{gate.gain.difference:+.4f} against the baseline (95 % {gate.gain.low:+.4f} … {gate.gain.high:+.4f})"
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
                version = registry.judged(known[0].number, self.evaluation_key)
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
                unmeasured = [task for task, entry in evaluation["tasks"].items() if entry["auc"] is None]
                if unmeasured:
                    tags["no test AUC of"] = ", ".join(unmeasured)
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

        While another process serves this pipeline, the version is verified at a private endpoint, which is stopped
        again; that process goes on with what it serves.

        Raises:
            CorankError: it does not start, or its scores differ from the offline scores.
        """
        from serving.deploy import beside, runs, serves_another, start
        from serving.ports import endpoint_url

        quiet()
        champion = self.registry.champion()
        if champion is None:
            raise CorankError("there is no champion to deploy; `corank run` trains one")
        self.require_own_features(champion)
        settings, options = self.serving_settings(champion), self.config.serving
        with self.progress.stage("deployment") as stage:
            stage.say(f"starting Ray Serve with model version {champion.number}")
            ensure_ray(self.config.ray)
            is_beside = serves_another() or (not runs() and self.serves_already())
            if is_beside:
                with beside(settings, options.host, options.port) as url:
                    verified = self._verify(url, champion, stage)
            else:
                verified = self._verify(start(settings, options.host, options.port), champion, stage)
            record = {
                "inputs": self.deployment_inputs(champion),
                "number": champion.number,
                "model": champion.tags.get("content", ""),
                "artifact": champion.artifact,
                "url": endpoint_url(options.host, options.port),
                "beside": is_beside,
                "verified": verified,
                **self.lineage(),
            }
            self.records.put("deployment", "current", record)
            where = (
                "verified at an endpoint of its own, as another process serves" if is_beside else f"at {record['url']}"
            )
            stage.say(
                f"version {champion.number} {where}, {verified['requests']} requests over HTTP equal offline scores "
                f"within {verified['largest_difference']:.1e}"
            )
        return record

    def _verify(self, url: str, champion: ModelVersion, stage: Stage) -> dict[str, Any]:
        from pipeline.verification import verify_endpoint

        stage.say("comparing its answers with offline scores")
        stored = self.record("feature_store", "online")  # of later partitions than ``until``, too
        partitions, close = sorted(stored["partitions"]), int(stored["close"])
        return verify_endpoint(url, champion.artifact, self.build_settings(stored), partitions, close)


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
