"""The local Ray: started when a stage needs it, stopped with the command, quiet in between."""

from __future__ import annotations

import logging
import os
import shlex
import signal
import socket
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from pydantic import Field

from features.schema import Declaration

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


_cluster: str | None = None  # address of the cluster this process is connected to; None: a Ray of its own
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
    logging.getLogger("mlflow.store.db").setLevel(logging.CRITICAL)  # prints the trace of what it raises


@contextmanager
def insistent_interrupts(every: float = 3.0) -> Iterator[None]:
    """Repeat a SIGINT or SIGTERM that the main thread got, every few seconds, until the block has ended.

    A handler raises its exception wherever the main thread happens to be. Inside a destructor or the callback of a
    weak reference Python prints the exception and drops it, and the command would run on.
    """
    ended = threading.Event()
    main = threading.main_thread().ident
    reader, writer = socket.socketpair()
    writer.setblocking(False)

    def insist() -> None:
        while number := reader.recv(1):  # every signal writes its number; so does every repetition
            if number[0] in (signal.SIGINT, signal.SIGTERM) and main is not None and not ended.wait(every):
                signal.pthread_kill(main, number[0])

    before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    watcher = threading.Thread(target=insist, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        signal.set_wakeup_fd(before)
        writer.close()
        watcher.join()
        reader.close()


@contextmanager
def _interrupted_afterwards() -> Iterator[None]:
    """A SIGINT or SIGTERM waits for the end of the block, and meets the handlers that were there before it.

    Half started, Ray can only be killed, and its agents would look for it for another minute.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # signals come to the main thread
        return
    came: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda one, _: came.append(one)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not set by Python
        if came:
            signal.raise_signal(came[0])


def _listen_on_loopback() -> None:
    """Let a Ray that starts later answer on 127.0.0.1 alone, as it does on laptops that are no Linux; elsewhere its
    processes answer on every interface, whatever address they are given."""
    from ray._private import ray_constants

    os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"  # for its processes
    ray_constants.ENABLE_RAY_CLUSTER = False  # for this one, which has read the variable already


def ensure_ray(config: RayConfig) -> None:
    """Connect to the configured cluster or start a local Ray, once per process."""
    import ray
    import ray.data  # sets its log level when imported; quiet() comes after

    from serving.proxy import announce

    quiet()
    if ray.is_initialized():
        return
    announce()
    local: dict[str, Any] = {}
    if not config.address:
        # a local controller may look at its few workers more often: it ends four seconds earlier
        os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
        local = {"num_cpus": config.num_cpus, "include_dashboard": False}
        local["object_store_memory"] = config.object_store_memory
        _listen_on_loopback()
        if shlex.quote(sys.executable) != sys.executable:  # Ray hands it to a shell as it is
            local["runtime_env"] = {"py_executable": shlex.quote(sys.executable)}
    global _cluster
    _cluster = config.address
    # connecting may last, and leaves nothing behind
    with nullcontext() if config.address else _interrupted_afterwards():
        _in_a_thread(
            lambda: ray.init(
                address=config.address or "local", log_to_driver=False, logging_level=logging.ERROR, **local
            )
        )


def _in_a_thread(work: Callable[[], object]) -> None:
    """Run something in a thread of its own, where it cannot replace the handlers of signals, and wait for it.

    First of all Ray would set a handler of SIGTERM that exits at once. The thread then stays as long as this process:
    the kernel ends the processes that Ray has started with the thread that started them.
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
    done.wait()
    if failures:
        raise failures[0]


def stop_ray() -> None:
    """Stop the local Ray of this process with all that runs on it; on a cluster, stop the service that this process
    started, and disconnect."""
    if "ray" not in sys.modules:
        return
    import ray

    if not ray.is_initialized():
        return
    if _cluster and "serving.deploy" in sys.modules:
        from serving.deploy import stop

        stop()
    ray.shutdown()
