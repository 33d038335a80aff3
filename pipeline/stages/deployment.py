"""``deployment``: the champion answers over HTTP as it scores offline, and is recorded as deployed."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from features.digest import digest
from features.errors import CorankError
from pipeline.records import LogRecord
from pipeline.runtime import ensure_ray, quiet
from pipeline.stages.feature_store import FEATURE_STORE, ONLINE, store_settings
from pipeline.stages.samples import build_settings
from pipeline.stages.stage import Stage
from pipeline.workspace import Workspace
from serving.ports import endpoint_url

if TYPE_CHECKING:
    from models.artifact import Artifact
    from pipeline.config import Config
    from pipeline.progress import Line
    from pipeline.workspace.registry import ModelVersion
    from serving.request_log import LogSettings
    from serving.settings import ServingSettings

SERVED_LOG = "served"
"""Folder of the workspace in which served requests are logged."""

CURRENT = "current"
"""Key of the only record."""

SERVED = ("serving", "current")
"""Folder and key of the document that names what is served; a running service follows it."""

SWITCH_SECONDS = 120.0
"""Seconds within which a running service must have taken a version over."""


@dataclass(frozen=True)
class DeploymentRecord(LogRecord):
    """The verified version.

    Attributes:
        number: of the version in the registry.
        model: version of its content.
        artifact: directory of the published model.
        url: of the endpoint.
        beside: verified at a private endpoint only, as another process serves and does not take it over.
        verified: what was compared (:func:`pipeline.deployment.verification.verify_endpoint`).
    """

    number: int = 0
    model: str = ""
    artifact: str = ""
    url: str = ""
    beside: bool = False
    verified: dict[str, Any] = field(default_factory=dict)


class Deployment(Stage[DeploymentRecord]):
    """A version whose answers over HTTP were verified."""

    name = "deployment"
    depends = ("feature_store", "champion")
    record = DeploymentRecord
    follows = True
    kinds = ("ray",)

    def inputs(self, workspace: Workspace) -> dict[str, str]:
        champion = workspace.registry.champion()
        if champion is None:
            return {CURRENT: ""}
        sections = workspace.config.digest_of("serving", "feast", "log_delay_seconds")
        return {CURRENT: digest([champion.number, champion.artifact, sections])}

    def run(self, workspace: Workspace, parts: Sequence[str]) -> dict[str, DeploymentRecord]:
        """Start the endpoint with the champion, verify its answers over HTTP, and record the version.

        While another process serves this pipeline, the version is verified at a private endpoint, which is stopped
        again; then that process takes it over while it answers, and is verified, too. A version that does not pass
        is champion no longer: the one that was verified before is again.

        Raises:
            CorankError: it does not start, or its scores differ from the offline scores.
        """
        from models.artifact import load_artifact
        from models.selfcheck import require_selfcheck
        from serving.deploy import beside, runs, serves_another, start

        (key,) = parts
        quiet()
        champion = workspace.registry.champion()
        if champion is None:
            raise CorankError("there is no champion to deploy; `corank run` trains one")
        require_own_features(workspace, champion)
        options = workspace.config.serving
        url, token = endpoint_url(options.host, options.port), options.own_token
        with workspace.progress.stage(self.name) as stage:
            stage.say(f"starting Ray Serve with model version {champion.number}")
            with _or_rolled_back(workspace, champion):
                artifact = load_artifact(champion.artifact)
                require_selfcheck(champion.artifact, artifact.model, artifact.metadata["selfcheck"])
            ensure_ray(workspace.config.ray)
            is_beside = serves_another() or (not runs() and serves_already(workspace))
            if is_beside:
                alone = replace(serving_settings(workspace, champion), follow=None)
                with beside(alone, options.host, options.port) as private, _or_rolled_back(workspace, champion):
                    verified = _verify(workspace, private, artifact, token, stage)
                stage.say(f"the running service takes version {champion.number} over")
                with _or_rolled_back(workspace, champion):
                    is_beside = not _switch(workspace, url, champion, token)
                    if not is_beside:
                        verified = _verify(workspace, url, artifact, token, stage)
            else:
                name_served(workspace, champion)
                start(serving_settings(workspace, champion), options.host, options.port)
                with _or_rolled_back(workspace, champion):
                    verified = _verify(workspace, url, artifact, token, stage)
            record = DeploymentRecord(
                inputs=self.inputs(workspace)[key],
                number=champion.number,
                model=champion.tags.get("content", ""),
                artifact=champion.artifact,
                url=url,
                beside=is_beside,
                verified=verified,
                **workspace.lineage(),
            )
            workspace.records.write(self, key, record)
            where = "verified at an endpoint of its own, as another process serves" if is_beside else f"at {record.url}"
            stage.say(
                f"version {champion.number} {where}, {verified['requests']} requests over HTTP equal offline scores "
                f"within {verified['largest_difference']:.1e}"
            )
        return {key: record}

    def shown(self, workspace: Workspace, parts: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Without the example request."""
        shown = super().shown(workspace, parts)
        for record in shown.values():
            record["verified"].pop("example", None)
        return shown


DEPLOYMENT = Deployment()


def name_served(workspace: Workspace, version: ModelVersion) -> None:
    """Name the version that is served from now on: a running service takes it over; its features stay registered."""
    options = workspace.config.serving
    url = endpoint_url(options.host, options.port)
    erased = (workspace.records.get(*SERVED) or {}).get("erased", 0)
    named = {"number": version.number, "artifact": version.artifact, "url": url, "erased": erased}
    workspace.records.put(*SERVED, named | _beside(workspace, version))


def _beside(workspace: Workspace, served: ModelVersion) -> dict[str, Any]:
    """The models of the config's split and shadow, as a running service reads them.

    Raises:
        CorankError: there is no such version.
    """
    options, versions = workspace.config.serving, {one.number: one for one in workspace.registry.versions()}
    chosen = {"split": options.split.version if options.split else None, "shadow": options.shadow}
    for name, number in chosen.items():
        if number is not None and number not in versions:
            raise CorankError(f"serving.{name}: there is no version {number}; there are {sorted(versions)}")
    found: dict[str, Any] = {}
    if options.split is not None and options.split.version != served.number:
        found["split"] = {"artifact": versions[options.split.version].artifact, "share": options.split.share}
    if options.shadow is not None and options.shadow != served.number:
        found["shadow"] = versions[options.shadow].artifact
    return found


def tell_of_erasure(workspace: Workspace) -> None:
    """Have a running service forget what it remembers of users: a ranker within a second, further ones with their next
    request."""
    served = workspace.records.get(*SERVED)
    if served is not None:
        workspace.records.put(*SERVED, {**served, "erased": time.time_ns() // 1_000})


def _switch(workspace: Workspace, url: str, champion: ModelVersion, token: str | None) -> bool:
    """Have the running service take a version over; False when it was started by a corank that cannot.

    Raises:
        CorankError: the service refuses the version, or does not take it over in time; it keeps the one before.
    """
    from serving.client import RankingClient

    before = workspace.records.get(*SERVED)
    if before is None:
        return False
    replicas, taken, named = workspace.config.serving.service_replicas, 0, False
    until, why = time.monotonic() + SWITCH_SECONDS, f"did not take it over within {SWITCH_SECONDS:g} s"
    with RankingClient(url, token=token) as client:
        while time.monotonic() < until:
            try:
                model = client.model()
            except CorankError as error:  # a replica may be gone for a moment, whatever the version is
                taken, why = 0, f"does not answer: {error}"
                time.sleep(0.2)
                continue
            if not named:
                if "refused" not in model:
                    return False
                name_served(workspace, champion)
                named = True
            taken = taken + 1 if model["model_version"] == champion.tags.get("content") else 0
            if taken >= 3 * replicas:  # so often that all replicas are likely to have answered
                return True
            refused = model["refused"] or {}
            if refused.get("artifact") == champion.artifact:
                why = f"refuses it: {refused['why']}"
                break
            time.sleep(0.2 if not taken else 0.0)
    workspace.records.put(*SERVED, before)
    raise CorankError(f"model version {champion.number}: the service at {url} {why}; it goes on with the one before")


@contextmanager
def _or_rolled_back(workspace: Workspace, champion: ModelVersion) -> Iterator[None]:
    """If the block fails, make the version that was verified before, if any, the champion again."""
    try:
        yield
    except CorankError as error:
        last = workspace.records.read(DEPLOYMENT, CURRENT)
        if last is None or not last.number or last.number == champion.number:
            raise
        back = workspace.registry.restore(last.number, champion.number, str(error))
        served = workspace.records.get(*SERVED)
        if served is not None and served["artifact"] == champion.artifact:
            name_served(workspace, back)
        raise CorankError(f"{error}\nVersion {back.number} is champion again; it was verified before.") from error


def _verify(workspace: Workspace, url: str, artifact: Artifact, token: str | None, stage: Line) -> dict[str, Any]:
    from pipeline.deployment.verification import verify_endpoint
    from serving.client import RankingClient

    stage.say("comparing its answers with offline scores")
    stored = workspace.records.require(FEATURE_STORE, ONLINE)  # it may cover later partitions than ``until``
    if stored.close is None:
        raise CorankError("the online store was never filled; run `corank run` first")
    build = build_settings(workspace, stored.versions)
    with RankingClient(url, token=token) as client:
        return verify_endpoint(
            client,
            artifact,
            build,
            sorted(stored.partitions),
            stored.close,
            precision=workspace.config.serving.precision,
        )


def require_own_features(workspace: Workspace, champion: ModelVersion) -> None:
    """
    Raises:
        CorankError: the champion reads other features than the config declares.
    """
    from pipeline.workspace.registry import published_schema

    if published_schema(champion.artifact) != workspace.config.schema_:
        raise CorankError(
            f"champion version {champion.number} reads other features than the config declares, so it cannot be "
            "started with this config; a service that runs is not touched. Start it with the config that it was "
            f"trained with ({champion.artifact}/model.yaml lists its features), or train a version of these "
            "features (`corank run`) or promote one (`corank models promote`)"
        )


def serves_already(workspace: Workspace) -> bool:
    """Whether an endpoint of this pipeline, of another process, answers at the config's address.

    Raises:
        CorankError: something else has the port.
    """
    from serving.auth import UnauthorizedError
    from serving.client import NoEndpointError, RankingClient
    from serving.ports import is_free, require_free

    options = workspace.config.serving
    if is_free(options.host, options.port):
        return False
    if not is_free(options.host, 0):  # not an address of this machine, so that nobody can be asked there
        require_free(options.host, options.port)
    url = endpoint_url(options.host, options.port)
    try:
        with RankingClient(url, timeout=10.0, token=options.own_token) as client:
            model = client.model()["model_version"]
    except NoEndpointError:
        require_free(options.host, options.port)
        return False
    except UnauthorizedError as error:
        raise CorankError(
            f"serving: the endpoint at {url} takes no token of serving.tokens, so it is another pipeline's, or was "
            "started with another file. Set `serving.port` to a free port, or stop it."
        ) from error
    except CorankError:  # an endpoint of corank, without a model at the moment
        return True
    if model not in [version.tags.get("content") for version in workspace.registry.versions()]:
        raise CorankError(
            f"serving: an endpoint of another pipeline (model {model}) uses {options.host}:{options.port}. "
            "Set `serving.port` to a free port, or stop it."
        )
    return True


def serving_settings(workspace: Workspace, champion: ModelVersion) -> ServingSettings:
    """What the application needs to serve the champion."""
    from serving.settings import ServingSettings

    config = workspace.config
    return ServingSettings(
        champion.artifact,
        store_settings(workspace),
        config.serving,
        log_delay=config.log_delay,
        follow=config.path("records", *SERVED) + ".json",
        log=log_settings(config),
    )


def log_settings(config: Config) -> LogSettings | None:
    """Where served requests are logged; None: nowhere."""
    from serving.request_log import LogSettings

    options = config.serving
    if not options.log_share:
        return None
    return LogSettings(config.path(SERVED_LOG), config.grain, options.log_share, options.log_seconds)
