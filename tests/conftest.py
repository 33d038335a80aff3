"""Shared by all tests: one quiet local Ray and one Redis per session, started when the first test needs them."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator

import pytest

import features.store  # noqa: F401 (before any test imports Feast: it decides how)
from pipeline.runtime import RayConfig, ensure_ray, quiet, stop_ray
from tests.servers import free_port, wait_for

quiet()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first: of several processes none is left with one of them in the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """A local Ray; Serve and Ray are stopped when the session ends."""
    ensure_ray(RayConfig())
    yield
    stop_ray()


@pytest.fixture(scope="session")
def redis_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """``host:port`` of a Redis server of the tests' own, which keeps nothing on disk."""
    binary = shutil.which("redis-server")
    if binary is None:
        pytest.skip("redis-server is not installed (apt-get install redis-server)")
    port = free_port()
    folder = tmp_path_factory.mktemp("redis")
    options = {"port": port, "bind": "127.0.0.1", "save": "", "appendonly": "no", "dir": folder}
    arguments = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    server = subprocess.Popen([binary, *arguments], stdout=subprocess.DEVNULL)
    try:
        wait_for(server, port)
        yield f"127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(10)


@pytest.fixture(scope="session")
def chromium() -> str:
    """A browser without a window."""
    binary = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if binary is None:
        pytest.skip("chromium is not installed (apt-get install chromium)")
    return binary
