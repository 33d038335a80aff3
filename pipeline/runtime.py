"""The local Ray: started when a stage needs it, stopped with the command, quiet in between."""

from __future__ import annotations

import fcntl
import logging
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from pydantic import Field

from features.schema import Declaration
from features.tasks import ray_runs
from pipeline.interrupts import deferred, reinstate

SESSIONS, OWNER = "corank-", "owner"
"""Prefix of the name of a folder for Ray's sessions, and the file in it that the owner of the sessions has locked."""

LONGEST_FOLDER = 27
"""Most letters of the folder; a socket's path adds up to 80, and may have 107 in all."""

MOMENT = 0.05
"""Seconds between two looks at a Ray that is being started."""

LEAST_OBJECT_STORE = 80_000_000
"""Bytes; Ray starts with no smaller object store."""


class RayConfig(Declaration):
    address: str | None = Field(None, description="an existing cluster, e.g. auto; default: a local Ray")
    num_cpus: int | None = Field(None, ge=1, description="CPUs of the local Ray; default: all")
    object_store_memory: int | None = Field(
        None, ge=LEAST_OBJECT_STORE, description="bytes of the local Ray's object store; default: as Ray chooses"
    )
    concurrent_buckets: int | None = Field(
        None,
        ge=1,
        description="buckets built at a time; memory is bounded by a bucket times this; default: one per CPU",
    )


_cluster: str | None = None  # address of the cluster this process is connected to; None: a local Ray
CHATTY = ("ray", "ray.data", "ray.train", "ray.serve", "mlflow", "alembic", "feast", "great_expectations", "dagster")


def quiet() -> None:
    """Keep the libraries' chatter out of the user's terminal; errors still come through."""
    os.environ.setdefault("GX_ANALYTICS_ENABLED", "false")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_CONFIGURE_LOGGING", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("TQDM_DISABLE", "1")
    warnings.filterwarnings("ignore")
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("mlflow.store.db").setLevel(logging.CRITICAL)  # it prints a trace of each error that it raises


_owner: TextIO | None = None  # its lock says that the owner of a folder of sessions lives


def _own_folder() -> Path:
    """A new folder for the sessions of this process's Ray, inside Ray's temporary folder, instead of the one that all
    share. The folders of processes that have ended are deleted; their logs could be looked at until now."""
    global _owner
    clear_sessions()
    folder = Path(tempfile.mkdtemp(prefix=SESSIONS, dir=_temporary_folder()))
    _owner = (folder / f".{OWNER}").open("w")
    fcntl.flock(_owner, fcntl.LOCK_EX)
    (folder / f".{OWNER}").rename(folder / OWNER)  # nobody sees it unlocked
    return folder


def _temporary_folder() -> str:
    """Ray's, or /tmp where the paths of Ray's sockets would become too long below that."""
    from ray._common.utils import get_default_system_temp_dir

    folder: str = get_default_system_temp_dir()  # type: ignore[no-untyped-call]
    return folder if len(folder) <= LONGEST_FOLDER or "RAY_TMPDIR" in os.environ else "/tmp"


def clear_sessions() -> None:
    """Delete the folders of local Rays whose commands, of this user, have ended or were killed."""
    for owner in Path(_temporary_folder()).glob(f"{SESSIONS}*/{OWNER}"):
        with suppress(FileNotFoundError), owner.open() as lock:
            if os.fstat(lock.fileno()).st_uid != os.getuid():
                continue
            with suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(owner.parent, ignore_errors=True)  # its last processes may still be writing


def _listen_on_loopback() -> None:
    """Let a Ray that starts later listen on 127.0.0.1 alone, as it does by default except on Linux. There its processes
    would listen on every interface, whatever address they are given."""
    from ray._private import ray_constants

    os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"  # for Ray's processes
    ray_constants.ENABLE_RAY_CLUSTER = False  # for this one, which has read the variable already


def _in_sessions_of_their_own() -> None:
    """Keep the processes of a Ray that starts later out of this one's group, to which terminals and process managers
    send their signals: when Ray ends first, this process waits a minute for it."""
    from ray._private import services, utils

    if utils.detect_fate_sharing_support():  # type: ignore[no-untyped-call]  # elsewhere Ray's reaper finds them by the group
        services.ConsolePopen = partial(subprocess.Popen, start_new_session=True)  # type: ignore[misc,assignment]


def ensure_ray(config: RayConfig) -> None:
    """Connect to the configured cluster or start a local Ray, once per process."""
    import ray
    import ray.data  # before quiet(), as importing it sets its log level

    from serving.proxy import announce

    quiet()
    if ray.is_initialized():
        return
    announce()
    local: dict[str, Any] = {}
    if not config.address:
        # the controller of a local Ray looks at its few workers more often and so ends four seconds earlier
        os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
        local = {"num_cpus": config.num_cpus, "include_dashboard": False}
        local["object_store_memory"] = config.object_store_memory
        local["_temp_dir"] = str(_own_folder())
        _listen_on_loopback()
        _in_sessions_of_their_own()
        if shlex.quote(sys.executable) != sys.executable:  # Ray passes it to a shell unquoted
            local["runtime_env"] = {"py_executable": shlex.quote(sys.executable)}
    global _cluster
    _cluster = config.address
    # a half-started Ray can only be killed; connecting may take long, but leaves nothing behind
    with nullcontext() if config.address else deferred():
        _in_a_thread(
            lambda: ray.init(
                address=config.address or "local", log_to_driver=False, logging_level=logging.ERROR, **local
            )
        )
        reinstate()


def _in_a_thread(work: Callable[[], object]) -> None:
    """Run something in another thread, where it cannot replace the handlers of signals, and wait for it.

    In the main thread Ray would first set a handler of SIGTERM that exits at once. The native handlers that it sets
    while it connects, which print a trace before Python's come, stay until Python runs again. The thread then stays
    as long as this process: the kernel ends the processes that Ray has started with the thread that started them.
    """
    failures: list[BaseException] = []
    done = threading.Event()

    def run() -> None:
        try:
            work()
        except BaseException as error:
            failures.append(error)
        done.set()
        threading.Event().wait()

    threading.Thread(target=run, name="starts Ray", daemon=True).start()
    while not done.wait(MOMENT):
        reinstate()
    if failures:
        raise failures[0]


def stop_ray() -> None:
    """Stop the local Ray of this process with all that runs on it; on a cluster, stop the service that this process
    started, and disconnect. A service that logs is asked to end, so that it writes what it holds."""
    if not ray_runs():
        return
    import ray

    if "serving.deploy" in sys.modules:
        from serving.deploy import finish, stop

        (stop if _cluster else finish)()
    ray.shutdown()
    if _owner is not None:
        _owner.close()
