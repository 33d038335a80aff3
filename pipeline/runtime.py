"""The local Ray: started when a stage needs it, stopped with the command, quiet in between."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import warnings

from pipeline.config import RayConfig

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


def ensure_ray(config: RayConfig) -> None:
    """Connect to the configured cluster or start a local Ray, once per process."""
    import ray
    import ray.data  # sets its log level when imported; quiet() comes after

    quiet()
    if ray.is_initialized():
        return
    local = {} if config.address else {"num_cpus": config.num_cpus, "include_dashboard": False}
    global _cluster
    _cluster = config.address
    on_terminate = signal.getsignal(signal.SIGTERM)
    ray.init(address=config.address or "local", log_to_driver=False, logging_level=logging.ERROR, **local)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_terminate)  # Ray puts its own in place


def stop_ray() -> None:
    """Stop the local Ray of this process with all that runs on it; on a cluster, stop Serve and disconnect."""
    if "ray" not in sys.modules:
        return
    import ray

    if not ray.is_initialized():
        return
    if _cluster and "ray.serve" in sys.modules:
        from ray import serve

        serve.shutdown()
    ray.shutdown()
