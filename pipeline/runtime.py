"""The local Ray: started when a stage needs it, stopped with the command, quiet in between."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.config import RayConfig


def quiet() -> None:
    """Keep the libraries' chatter out of the user's terminal; errors still come through."""
    os.environ.setdefault("GX_ANALYTICS_ENABLED", "false")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_CONFIGURE_LOGGING", "0")
    os.environ.setdefault("FEAST_USAGE", "False")
    os.environ.setdefault("TQDM_DISABLE", "1")
    warnings.filterwarnings("ignore")
    for name in ("ray", "ray.data", "ray.train", "ray.serve", "mlflow", "alembic", "feast", "great_expectations"):
        logging.getLogger(name).setLevel(logging.ERROR)


def ensure_ray(config: RayConfig) -> None:
    """Connect to the configured cluster or start a local Ray, once per process."""
    import ray

    if ray.is_initialized():
        return
    quiet()
    local = {} if config.address else {"num_cpus": config.num_cpus, "include_dashboard": False}
    ray.init(
        address=config.address or "local", log_to_driver=False, logging_level=logging.ERROR, **local
    )
    logging.getLogger("ray.data").setLevel(logging.ERROR)


@contextmanager
def ray_session() -> Iterator[None]:
    """Whatever happens inside, Serve and a Ray started here are gone afterwards."""
    try:
        yield
    finally:
        stop_ray()


def stop_ray() -> None:
    """Stop Serve and the local Ray of this process, if any."""
    import sys

    if "ray" not in sys.modules:
        return
    import ray

    if ray.is_initialized():
        if "ray.serve" in sys.modules:
            from ray import serve

            serve.shutdown()
        ray.shutdown()
