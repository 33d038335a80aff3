"""Whether this machine and what the config names are fit for a run: findings, each with a remedy."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement

from features.errors import CorankError, message_of
from pipeline.config import Config

LEAST_FREE = 5 << 30
"""Bytes of free space below which a run may fill a disk."""

LEAST_SHARED_MEMORY = 1 << 30
"""Bytes of /dev/shm below which Ray puts its objects on the disk."""

LEAST_FILES = 4_096
"""Open files that a process must be allowed; Ray and Serve need thousands."""

SECONDS = 5.0
"""After which a server is taken not to answer."""

Level = Literal["ok", "warning", "failure"]


@dataclass(frozen=True)
class Finding:
    """What a check found.

    Attributes:
        remedy: what to do; empty when nothing is.
    """

    check: str
    level: Level
    found: str
    remedy: str = ""


def examine(config: Config) -> Iterator[Finding]:
    """All findings, check after check. A check that breaks is a failure itself."""
    for name, check in CHECKS.items():
        try:
            yield from check(config)
        except Exception as error:  # the others are still of use
            told = str(error) if isinstance(error, CorankError) else message_of(error)
            yield Finding(name, "failure", told, "mend what the message names")


def _versions(_: Config) -> Iterator[Finding]:
    wrong = []
    for text in importlib.metadata.requires("corank") or ():
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} {version} is not {requirement.specifier}")
    if wrong:
        yield Finding(
            "versions",
            "failure",
            "; ".join(wrong),
            "pip install --constraint constraints.txt --editable .",
        )
    else:
        yield Finding("versions", "ok", f"Python {platform.python_version()}, all packages as corank needs them")


def _machine(config: Config) -> Iterator[Finding]:
    import torch

    cpus, gpus = os.cpu_count() or 1, torch.cuda.device_count()
    yield Finding("machine", "ok", f"{cpus} CPUs, {gpus} GPUs")
    if config.training.use_gpu and not gpus and config.ray.address is None:
        yield Finding("machine", "failure", "training.use_gpu is set, and there is no GPU", "unset it, or ray.address")
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files != resource.RLIM_INFINITY and files < LEAST_FILES:
        yield Finding("machine", "warning", f"a process may open {files:,} files", f"ulimit -n {LEAST_FILES}")
    shared = Path("/dev/shm")
    if shared.is_dir() and shutil.disk_usage(shared).total < LEAST_SHARED_MEMORY:
        size = shutil.disk_usage(shared).total >> 20
        yield Finding("machine", "warning", f"/dev/shm has {size:,} MiB", "docker run --shm-size=2g, or an emptyDir")


def _disk(config: Config) -> Iterator[Finding]:
    places = {tempfile.gettempdir(): "temporary files and Ray's", str(config.local_path()): "the local files"}
    if "://" not in config.workspace:
        places[config.path()] = "the workspace"
    for place, what in places.items():
        there = next(path for path in (Path(place), *Path(place).parents) if path.exists())
        free = shutil.disk_usage(there).free
        if not os.access(there, os.W_OK):
            yield Finding("disk", "failure", f"{place} ({what}) cannot be written", f"chown or chmod {there}")
        elif free < LEAST_FREE:
            yield Finding("disk", "warning", f"{free / 1e9:.1f} GB free at {place} ({what})", "free some, or move it")
        else:
            yield Finding("disk", "ok", f"{free / 1e9:,.0f} GB free at {place} ({what})")


def _clock(_: Config) -> Iterator[Finding]:
    with tempfile.NamedTemporaryFile() as file:
        ahead = os.stat(file.name).st_mtime - time.time()
    if abs(ahead) > 1 or time.localtime().tm_year < 2024:
        yield Finding("clock", "failure", f"it and the disk's differ by {ahead:.1f} s", "synchronise it (chrony)")
    else:
        yield Finding("clock", "ok", time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()))


def _tables(config: Config) -> Iterator[Finding]:
    for role in config.tables:
        table = config.table(role)
        if not table.exists():
            yield Finding("tables", "failure", f"{role}: no Delta table at {table.uri}", "write it, or mend its path")
            continue
        yield Finding("tables", "ok", f"{role}: {len(table.schema().names)} columns at {table.uri}")


def _workspace(config: Config) -> Iterator[Finding]:
    from features.delta.paths import file_system

    if "://" not in config.workspace:
        return  # the disk's check has looked at it
    store, root = file_system(config.path("doctor"))
    store.create_dir(root, recursive=True)
    with store.open_output_stream(f"{root}/probe") as stream:
        stream.write(b"probe")
    store.delete_dir(root)
    yield Finding("workspace", "ok", f"{config.path()} can be written")


def _servers(config: Config) -> Iterator[Finding]:
    if config.feast.online == "redis":
        yield _answers("online store", config.feast.redis.split(",")[0], "start Redis, or correct feast.redis")
    if config.mlflow_uri and "://" in config.mlflow_uri:
        from urllib.parse import urlsplit

        where = urlsplit(config.mlflow_uri)
        if where.hostname:
            port = where.port or {"https": 443, "http": 80, "postgresql": 5432}.get(where.scheme.split("+")[0], 80)
            yield _answers("MLflow", f"{where.hostname}:{port}", "start it, or correct mlflow_uri")


def _answers(what: str, where: str, remedy: str) -> Finding:
    host, _, port = where.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=SECONDS).close()
    except (OSError, ValueError) as error:
        return Finding("servers", "failure", f"{what} at {where}: {error}", remedy)
    return Finding("servers", "ok", f"{what} answers at {where}")


def _ray(config: Config) -> Iterator[Finding]:
    if config.ray.address is None:
        yield Finding("ray", "ok", "a local Ray is started by each command")
        return
    import ray

    from pipeline.runtime import ensure_ray, stop_ray

    ensure_ray(config.ray)
    try:
        nodes = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
        resources = ray.cluster_resources()  # type: ignore[no-untyped-call]
        cpus, gpus = resources.get("CPU", 0), resources.get("GPU", 0)
        yield Finding("ray", "ok", f"{len(nodes)} nodes at {config.ray.address}: {cpus:g} CPUs, {gpus:g} GPUs")
        if config.training.use_gpu and not gpus:
            yield Finding("ray", "failure", "training.use_gpu is set, and the cluster has no GPU", "add GPU workers")
        if len(nodes) > 1 and not (config.local or "").startswith("/"):
            yield Finding(
                "ray",
                "warning",
                "models and checkpoints lie in a local folder, which the other nodes may not see",
                "set `local` to a folder that all nodes share",
            )
    finally:
        stop_ray()


def _endpoint(config: Config) -> Iterator[Finding]:
    from serving.auth import read_tokens
    from serving.ports import is_free

    options = config.serving
    if options.tokens is not None:
        yield Finding("endpoint", "ok", f"{len(read_tokens(Path(options.tokens)))} tokens in {options.tokens}")
    if is_free(options.host, options.port):
        yield Finding("endpoint", "ok", f"{options.host}:{options.port} is free")
    else:
        yield Finding(
            "endpoint",
            "warning",
            f"{options.host}:{options.port} is in use",
            "fine if `corank serve` runs; else set serving.port to a free one",
        )


CHECKS: dict[str, Callable[[Config], Iterator[Finding]]] = {
    "versions": _versions,
    "machine": _machine,
    "disk": _disk,
    "clock": _clock,
    "tables": _tables,
    "workspace": _workspace,
    "servers": _servers,
    "ray": _ray,
    "endpoint": _endpoint,
}
