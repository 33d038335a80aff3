"""``corank serve | query``: the endpoint. Heavy imports stay inside the commands."""

from __future__ import annotations

import json
import signal
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.commands.common import ConfigOption, DebugOption, UrlOption, guarded, load, open_workspace

if TYPE_CHECKING:
    from pipeline.workspace import Workspace


def serve(config: ConfigOption, debug: DebugOption = False) -> None:
    """Start the endpoint with the verified champion and keep it up until Ctrl-C."""
    with guarded(debug):
        keep_serving(open_workspace(load(config)), running=False)


def keep_serving(workspace: Workspace, running: bool) -> None:
    """Serve the champion until Ctrl-C; ``running``: the endpoint is up already."""
    from features.errors import CorankError
    from pipeline.runtime import ensure_ray
    from pipeline.stages.deployment import CURRENT, DEPLOYMENT, name_served, require_own_features, serving_settings
    from pipeline.stages.feature_store import require_store
    from serving.deploy import start
    from serving.ports import endpoint_url, require_free

    champion = workspace.registry.champion()
    if champion is None:
        raise CorankError("there is no champion to serve; `corank run` trains one")
    options = workspace.config.serving
    url = endpoint_url(options.host, options.port)
    if not running:
        require_own_features(workspace, champion)
        require_store(workspace)
        if not workspace.config.ray.address:  # on a cluster the service of a process that was killed is taken over
            require_free(options.host, options.port)
        if not DEPLOYMENT.stale(workspace) or DEPLOYMENT.run(workspace, [CURRENT])[CURRENT].beside:
            with workspace.progress.stage("serving") as stage:
                stage.say(f"starting Ray Serve with verified version {champion.number}")
                ensure_ray(workspace.config.ray)
                name_served(workspace, champion)
                url = start(serving_settings(workspace, champion), options.host, options.port)
                stage.say(f"version {champion.number} at {url}")
    typer.echo(f"{url} is up. POST {url}/v1/rank; interactive documentation at {url}/docs. Ctrl-C stops it.")
    signal.pause()


def query(
    config: ConfigOption,
    user: Annotated[str | None, typer.Option(help="User id. Default: an example from the newest partition.")] = None,
    candidates: Annotated[str | None, typer.Option(help="Item ids, separated by commas.")] = None,
    context: Annotated[str | None, typer.Option(help='Context as JSON, e.g. \'{"device": "mobile"}\'.')] = None,
    ts: Annotated[
        int | None, typer.Option(help="Time of the request, microseconds UTC. Default: close of the newest partition.")
    ] = None,
    url: UrlOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the answer as JSON.")] = False,
    debug: DebugOption = False,
) -> None:
    """Ask the running endpoint to rank candidates for a user."""
    with guarded(debug):
        from features.errors import ConfigError
        from pipeline.commands.summary import print_answer
        from pipeline.stages.deployment import CURRENT, DEPLOYMENT
        from pipeline.stages.feature_store import online_record
        from serving.client import RankingClient
        from serving.ports import endpoint_url

        loaded = load(config)
        workspace = open_workspace(loaded)
        deployed = workspace.records.read(DEPLOYMENT, CURRENT)
        example = deployed.verified.get("example", {}) if deployed is not None else {}
        if user is None and candidates is None and not example:
            raise ConfigError("give --user and --candidates; there is no deployment yet to take an example from")
        items = [item.strip() for item in candidates.split(",")] if candidates else example.get("candidates", [])
        try:
            given = json.loads(context) if context else example.get("context", {})
            json.dumps(given, allow_nan=False)
        except ValueError as error:
            raise ConfigError(f"--context is not JSON: {error}") from None
        if not isinstance(given, dict):
            raise ConfigError(f"--context is a {type(given).__name__}, not an object of columns and values")
        request: dict[str, Any] = {"user_id": user or example.get("user_id"), "candidates": items, "context": given}
        # those of the config are for its own endpoint alone
        token = None if url else loaded.serving.own_token
        with RankingClient(url or endpoint_url(loaded.serving.host, loaded.serving.port), token=token) as client:
            answer = client.rank(
                request["user_id"], items, given, ts if ts is not None else online_record(workspace).close
            )
        if as_json:
            typer.echo(json.dumps(answer))
        else:
            print_answer(request, answer)
