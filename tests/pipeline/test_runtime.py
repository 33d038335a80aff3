"""Ctrl-C is obeyed wherever it arrives."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import ray

from pipeline.runtime import insistent_interrupts
from pipeline.training.training import _fit
from tests.servers import free_port


class InterruptedDestructor:
    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)  # the handler raises here, where Python drops what is raised


def interrupted(work: Callable[[], None]) -> float:
    """Run it with interrupts repeated every 0.2 s; seconds until it was interrupted."""
    started = time.monotonic()
    try:
        with insistent_interrupts(every=0.2):
            work()
    except KeyboardInterrupt:
        return time.monotonic() - started
    pytest.fail("the work ran on")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_that_a_destructor_swallowed_is_raised_again() -> None:
    def work() -> None:
        InterruptedDestructor()  # its own interrupt is lost
        time.sleep(10)

    assert 0.2 <= interrupted(work) < 5


def test_an_interrupt_that_ended_the_work_is_not_raised_again() -> None:
    def work() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)

    assert interrupted(work) < 0.2
    time.sleep(0.5)  # nothing comes


class TakesOver:
    """What Ray Train does with Ctrl-C, and nothing else."""

    return_value = "what it says"

    def fit(self) -> TakesOver:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        return self


def test_after_training_tasks_of_its_process_can_be_cancelled_again() -> None:
    before = signal.getsignal(signal.SIGINT)
    assert _fit(TakesOver()) == "what it says"
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.slow
def test_sigterm_stops_a_command_that_is_connected_to_a_cluster(local_ray: None) -> None:
    program = f"""
import time
from pipeline.commands.common import guarded
from pipeline.runtime import RayConfig, ensure_ray
with guarded(False):
    ensure_ray(RayConfig(address="{ray.get_runtime_context().gcs_address}"))
    print("connected", flush=True)
    time.sleep(60)
"""
    command = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert command.stdout is not None
    assert command.stdout.readline() == "connected\n"
    command.send_signal(signal.SIGTERM)
    assert "stopped; run the same command again" in command.communicate(timeout=30)[1]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_while_ray_starts_leaves_no_process_behind(number: signal.Signals) -> None:
    program = """
import time
from pipeline.commands.common import guarded
from pipeline.runtime import RayConfig, ensure_ray
with guarded(False):
    ensure_ray(RayConfig(num_cpus=1))
    time.sleep(60)
"""
    command = psutil.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True)
    while not any(one.name() == "raylet" for one in command.children()):
        assert command.poll() is None
        time.sleep(0.01)
    time.sleep(1.0)  # its agents start, the driver waits for them
    started = command.children(recursive=True)
    command.send_signal(number)
    assert "stopped" in command.communicate(timeout=60)[1]
    assert len(started) > 2
    _, left = psutil.wait_procs(started, timeout=15)
    assert not left


LISTENING = """
import json, os, sys
import psutil, ray
from ray import serve
from pipeline.runtime import RayConfig, ensure_ray, stop_ray

ensure_ray(RayConfig(num_cpus=2, object_store_memory=80_000_000))

@ray.remote(num_cpus=0, runtime_env={"env_vars": {"AN": "environment"}})  # as Ray Train's actors have one
class Actor:
    def executable(self):
        return sys.executable

executable = ray.get(Actor.remote().executable.remote(), timeout=60)
serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})
ours = [one for child in psutil.Process().children(recursive=True) for one in child.net_connections("tcp")]
addresses = sorted({one.laddr.ip for one in ours if one.status == psutil.CONN_LISTEN})
stop_ray()
print(json.dumps({"executable": executable, "addresses": addresses, "ports": len(ours)}))
"""


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_local_ray_listens_on_loopback_alone_and_works_from_a_folder_with_a_space(tmp_path: Path) -> None:
    environment = tmp_path / "My Projects é" / ".venv"
    (environment / "bin").mkdir(parents=True)
    (environment / "lib").symlink_to(Path(sys.prefix) / "lib")
    (environment / "pyvenv.cfg").write_text((Path(sys.prefix) / "pyvenv.cfg").read_text())
    (environment / "bin" / "python").symlink_to(Path(sys.executable).resolve())
    python = str(environment / "bin" / "python")
    run = subprocess.run(
        [python, "-c", LISTENING, str(free_port())], capture_output=True, text=True, timeout=150, check=False
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["executable"] == python
    assert found["ports"] > 5
    assert set(found["addresses"]) <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
