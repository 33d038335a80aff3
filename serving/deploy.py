"""Starting and stopping the application on the Ray cluster of this process."""

from __future__ import annotations

import re
import time
from itertools import dropwhile

import ray
from ray import serve

from features.errors import CorankError
from serving.client import RankingClient
from serving.ports import endpoint_url, require_free
from serving.proxy import announce
from serving.ranking import APPLICATION, ServingSettings, build_application

COLOURS = re.compile("\x1b\\[[0-9;]*m")


def start(settings: ServingSettings, host: str = "127.0.0.1", port: int = 8000, timeout: float = 120.0) -> str:
    """Deploy the application, or replace the one that runs, and wait until its model answers.

    Ray is used as it is initialised; without that, Serve starts a local one.

    Args:
        timeout: seconds to wait for the first answer.

    Returns:
        the address of the endpoint, e.g. ``http://127.0.0.1:8000``.

    Raises:
        CorankError: the port is in use, the application does not start, or does not answer in time.
    """
    if not runs_here():
        require_free(host, port)
    url = endpoint_url(host, port)
    announce()
    serve.start(http_options={"host": host, "port": port})
    try:
        serve.run(build_application(settings), name=APPLICATION, route_prefix="/")
    except RuntimeError as error:
        raise CorankError(f"serving: the application did not start: {_reason(error)}") from error
    _wait(url, timeout)
    return url


def runs_here() -> bool:
    """Whether Serve runs on the Ray that this process uses: then :func:`start` replaces what it serves."""
    return bool(ray.is_initialized() and serve.status().proxies)


def stop() -> None:
    """Stop the application and Serve; Ray itself keeps running."""
    if ray.is_initialized():
        serve.shutdown()  # type: ignore[no-untyped-call]


def _wait(url: str, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    with RankingClient(url, timeout=10.0) as client:
        while True:
            try:
                client.healthz()
                return
            except CorankError as error:
                if time.monotonic() > deadline:
                    raise CorankError(f"serving: no answer within {timeout:g} s. Last: {error}") from None
            time.sleep(0.2)


def _reason(error: Exception) -> str:
    """What the replicas that did not start raised, from the status of the application; the log has all of it."""
    application = serve.status().applications.get(APPLICATION)
    messages = [one.message for one in application.deployments.values() if one.message] if application else []
    return "; ".join(dict.fromkeys(error_in(message) for message in messages)) or str(error)


def error_in(text: str) -> str:
    """The error that a text with stack traces ends with, all its lines; without its type where it says what to do."""
    lines = COLOURS.sub("", text).strip().splitlines()
    frames = [number for number, line in enumerate(lines) if line.startswith('  File "')]
    after = lines[frames[-1] + 1 :] if frames else lines
    own = list(dropwhile(lambda line: line.startswith("    "), after))  # the frame's code and its marks
    return re.sub(rf"^{CorankError.__module__}\.\w+: ", "", "\n".join(own))
