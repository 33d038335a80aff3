"""Ctrl-C is obeyed wherever it arrives."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import pytest

from pipeline.runtime import insistent_interrupts


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
