"""Shared by all tests: one quiet local Ray per session, started when the first test needs it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pipeline.config import RayConfig
from pipeline.runtime import ensure_ray, quiet, stop_ray

quiet()


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """A local Ray; Serve and Ray are stopped when the session ends."""
    ensure_ray(RayConfig())
    yield
    stop_ray()
