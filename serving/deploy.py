"""Starting and stopping the application on the Ray cluster of this process."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray import serve

from features.errors import CorankError, without_trace
from serving.application import APPLICATION, build_application
from serving.client import RankingClient
from serving.ports import endpoint_url, free_port, require_free
from serving.proxy import announce
from serving.settings import ServingSettings

_started = False  # whether this process started Serve
_logs = False  # whether what it started logs requests


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
    global _started, _logs
    if not runs():
        require_free(host, port)
    _started = True  # or took over the one that ran
    _logs = settings.log is not None
    announce()
    serve.start(http_options={"host": host, "port": port})
    _run(settings, APPLICATION, "/")
    url = endpoint_url(host, port)
    _wait(url, timeout)
    return url


@contextmanager
def beside(settings: ServingSettings, host: str, port: int, timeout: float = 120.0) -> Iterator[str]:
    """The address of a second endpoint, which lives as long as the block, beside the one at this host and port.

    Where Serve runs on the Ray of this process it is a second application there, else it has a free port of loopback.
    """
    if not runs():
        try:
            yield start(settings, port=free_port(), timeout=timeout)
        finally:
            stop()
        return
    name = f"{APPLICATION}-{uuid.uuid4().hex[:8]}"
    url = f"{endpoint_url(host, port)}/{name}"
    try:
        _run(settings, name, f"/{name}")
        _wait(url, timeout)
        yield url
    finally:
        serve.delete(name)


def runs() -> bool:
    """Whether Serve runs on the Ray that this process uses."""
    return bool(ray.is_initialized() and serve.status().proxies)


def serves_another() -> bool:
    """Whether a service runs on this Ray that this process did not start and therefore must not touch."""
    return runs() and not _started


def finish() -> None:
    """Let a service that this process started write the log that it holds, before its Ray is stopped."""
    if _started and _logs and ray.is_initialized():
        serve.delete(APPLICATION)


def stop() -> None:
    """Stop Serve, if this process started it or took it over; Ray itself keeps running."""
    global _started
    if ray.is_initialized() and _started:
        serve.shutdown()  # type: ignore[no-untyped-call]
    _started = False


def _run(settings: ServingSettings, name: str, route_prefix: str) -> None:
    try:
        serve.run(build_application(settings), name=name, route_prefix=route_prefix)
    except RuntimeError as error:
        raise CorankError(f"serving: the application did not start: {_reason(name, error)}") from error


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


def _reason(name: str, error: Exception) -> str:
    """Why replicas did not start, from the status of the application; the log has the whole trace."""
    application = serve.status().applications.get(name)
    messages = [status.message for status in application.deployments.values() if status.message] if application else []
    return "; ".join(dict.fromkeys(without_trace(message) for message in messages)) or str(error)
