"""SIGINT and SIGTERM end a command from its first moment on: one message, 130 or 143, nothing left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

import psutil
import pytest
import ray

from pipeline import interrupts
from pipeline.interrupts import interruptible
from pipeline.training.training import _fit

BOTH = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])


class InterruptedDestructor:
    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)  # the handler raises here, where Python drops what is raised


def interrupted(work: Callable[[], None]) -> float:
    """Run it; seconds until it was interrupted."""
    started = time.monotonic()
    try:
        with interruptible():
            work()
    except KeyboardInterrupt:
        return time.monotonic() - started
    pytest.fail("the work ran on")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_that_a_destructor_swallowed_is_raised_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupts, "REPEAT", 0.2)

    def work() -> None:
        InterruptedDestructor()  # its own interrupt is lost
        time.sleep(10)

    assert 0.2 <= interrupted(work) < 5


def test_an_interrupt_that_ended_the_work_is_not_raised_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupts, "REPEAT", 0.2)

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


# --- commands -------------------------------------------------------------------------------------------


def start(program: str, *arguments: str, ignored: bool = False) -> psutil.Popen:
    """A program in a process group of its own; ``ignored``: as a script starts it with ``&``."""
    return psutil.Popen(
        [sys.executable, "-c", program, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=(lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)) if ignored else None,
    )


def wait_for(stream: IO[str], line: str) -> None:
    assert stream.readline() == f"{line}\n"


def assert_ended(
    command: psutil.Popen,
    number: signal.Signals,
    within: float,
    started: list[psutil.Process],
    connecting: bool = False,
) -> None:
    """It ends by itself, says so once, and what it had started is gone.

    Args:
        connecting: to Ray, whose handler prints a trace; Python cannot set its own again before Ray is done.
    """
    since = time.monotonic()
    errors = command.communicate(timeout=60)[1]
    assert command.returncode == 128 + number, errors
    assert time.monotonic() - since < within
    assert "stopped; run the same command again to continue" in errors.splitlines()[-1]
    assert number.name in errors.splitlines()[-1]
    assert errors.count("stopped") == 1
    assert "Traceback" not in errors
    assert connecting or "SIGTERM received" not in errors  # what Ray's own handler says
    _, left = psutil.wait_procs(started, timeout=2)
    assert not left


def catches_sigterm(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="sees in /proc when handlers are there")
@BOTH
def test_a_signal_while_the_command_is_imported_ends_it(number: signal.Signals) -> None:
    command = start("from pipeline.cli import main; main()", "run", "--config", "none.yaml")
    while not catches_sigterm(command.pid):  # typer, and all else, comes later
        time.sleep(0.001)
    os.killpg(command.pid, number)
    assert_ended(command, number, 5, [])


def test_sigterm_stops_a_command_that_a_script_started_in_the_background_whatever_dagster_sets() -> None:
    program = """
import time
from dagster._utils.interrupts import capture_interrupts, setup_interrupt_handlers
from pipeline.commands.common import guarded
with guarded(False):
    with capture_interrupts():
        pass
    setup_interrupt_handlers()
    print("works", flush=True)
    time.sleep(60)
"""
    command = start(program, ignored=True)
    wait_for(command.stdout, "works")
    command.send_signal(signal.SIGTERM)
    assert_ended(command, signal.SIGTERM, 5, [])


STUBBORN = """
import os, subprocess, sys, time
from pipeline import interrupts
from pipeline.commands.common import guarded
interrupts.GRACE, interrupts.REPEAT = float(sys.argv[1]), 0.5
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
with guarded(False):
    print("works", flush=True)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # as Dagster does
    while True:
        try:
            time.sleep(60)
        except KeyboardInterrupt:
            pass
"""


@pytest.mark.parametrize(("grace", "signals", "at_least"), [("1.5", 1, 1.4), ("60", 2, 0.0)])
def test_what_does_not_end_is_killed_with_all_it_started_after_a_while_or_by_a_second_signal(
    grace: str, signals: int, at_least: float
) -> None:
    command = start(STUBBORN, grace)
    wait_for(command.stdout, "works")
    started = command.children(recursive=True)
    assert started
    since = time.monotonic()
    for _ in range(signals):
        time.sleep(interrupts.SAME + 0.2)
        os.kill(command.pid, signal.SIGINT)
    assert_ended(command, signal.SIGINT, 5, started)
    assert time.monotonic() - since > at_least


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
    command = start(program)
    wait_for(command.stdout, "connected")
    command.send_signal(signal.SIGTERM)
    assert_ended(command, signal.SIGTERM, 15, [])


@pytest.mark.slow
@BOTH
def test_a_signal_to_the_group_while_ray_starts_leaves_no_process_behind(number: signal.Signals) -> None:
    program = """
import time
from pipeline.commands.common import guarded
from pipeline.runtime import RayConfig, ensure_ray
with guarded(False):
    ensure_ray(RayConfig(num_cpus=1))
    time.sleep(60)
"""
    command = start(program)
    while not any(one.name() == "raylet" for one in command.children()):
        assert command.poll() is None
        time.sleep(0.01)
    time.sleep(1.0)  # its agents start, the driver waits for them
    started = command.children(recursive=True)
    assert len(started) > 2
    os.killpg(command.pid, number)
    assert_ended(command, number, 15, started, connecting=True)


@pytest.mark.slow
def test_a_command_whose_ray_has_got_the_signal_too_ends_in_time() -> None:
    """As systemd sends it, to every process of a service."""
    program = """
import ray
from pipeline import interrupts
from pipeline.commands.common import guarded
from pipeline.runtime import RayConfig, ensure_ray
interrupts.GRACE = 2
with guarded(False):
    ensure_ray(RayConfig(num_cpus=1))
    @ray.remote(num_cpus=0)
    def work():
        import time
        time.sleep(100)
    running = work.remote()
    print("works", flush=True)
    ray.get(running)
"""
    command = start(program)
    wait_for(command.stdout, "works")
    started = command.children(recursive=True)
    for one in [*started, command]:
        one.send_signal(signal.SIGTERM)
    assert_ended(command, signal.SIGTERM, 8, started)
