"""``deployment``: the champion answers over HTTP as it scores offline, and is recorded as deployed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from features.digest import digest
from features.errors import CorankError
from pipeline.records import LogRecord
from pipeline.runtime import ensure_ray, quiet
from pipeline.stages.feature_store import FEATURE_STORE, ONLINE, store_settings
from pipeline.stages.samples import build_settings
from pipeline.stages.stage import Stage
from pipeline.workspace import Workspace

if TYPE_CHECKING:
    from pipeline.progress import Line
    from pipeline.workspace.registry import ModelVersion
    from serving.settings import ServingSettings

CURRENT = "current"
"""Key of the only record."""


@dataclass(frozen=True)
class DeploymentRecord(LogRecord):
    """The verified version.

    Attributes:
        number: of the version in the registry.
        model: version of its content.
        artifact: directory of the published model.
        url: of the endpoint.
        beside: it was verified at an endpoint of its own, as another process serves.
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
        again; that process goes on with what it serves.

        Raises:
            CorankError: it does not start, or its scores differ from the offline scores.
        """
        from serving.deploy import beside, runs, serves_another, start
        from serving.ports import endpoint_url

        (key,) = parts
        quiet()
        champion = workspace.registry.champion()
        if champion is None:
            raise CorankError("there is no champion to deploy; `corank run` trains one")
        require_own_features(workspace, champion)
        settings, options = serving_settings(workspace, champion), workspace.config.serving
        with workspace.progress.stage(self.name) as stage:
            stage.say(f"starting Ray Serve with model version {champion.number}")
            ensure_ray(workspace.config.ray)
            is_beside = serves_another() or (not runs() and serves_already(workspace))
            if is_beside:
                with beside(settings, options.host, options.port) as url:
                    verified = _verify(workspace, url, champion, stage)
            else:
                url = start(settings, options.host, options.port)
                verified = _verify(workspace, url, champion, stage)
            record = DeploymentRecord(
                inputs=self.inputs(workspace)[key],
                number=champion.number,
                model=champion.tags.get("content", ""),
                artifact=champion.artifact,
                url=endpoint_url(options.host, options.port),
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


def _verify(workspace: Workspace, url: str, champion: ModelVersion, stage: Line) -> dict[str, Any]:
    from pipeline.deployment.verification import verify_endpoint

    stage.say("comparing its answers with offline scores")
    stored = workspace.records.require(FEATURE_STORE, ONLINE)  # of later partitions than ``until``, too
    if stored.close is None:
        raise CorankError("the online store was never filled; run `corank run` first")
    build = build_settings(workspace, stored.versions)
    return verify_endpoint(url, champion.artifact, build, sorted(stored.partitions), stored.close)


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
    from serving.client import NoEndpointError, RankingClient
    from serving.ports import endpoint_url, is_free, require_free

    options = workspace.config.serving
    if is_free(options.host, options.port):
        return False
    if not is_free(options.host, 0):  # no address of this machine, where nobody can be asked
        require_free(options.host, options.port)
    try:
        with RankingClient(endpoint_url(options.host, options.port), timeout=10.0) as client:
            model = client.model()["model_version"]
    except NoEndpointError:
        require_free(options.host, options.port)
        return False
    except CorankError:  # it is one, without a model at the moment
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
    return ServingSettings(champion.artifact, store_settings(workspace), config.serving, log_delay=config.log_delay)
