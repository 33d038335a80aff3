"""Ctrl-C is obeyed wherever it arrives."""

from __future__ import annotations

import os
import signal
import time

import pytest

from pipeline.runtime import insistent_interrupts


class InterruptedDestructor:
    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)  # the handler raises here, where Python drops what is raised


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_that_a_destructor_swallowed_is_raised_again() -> None:
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt), insistent_interrupts(every=0.2):
        unlucky = InterruptedDestructor()
        del unlucky  # swallowed
        while time.monotonic() - started < 10:
            time.sleep(0.01)
    assert 0.2 <= time.monotonic() - started < 5


def test_an_interrupt_that_ended_the_work_is_not_raised_again() -> None:
    with pytest.raises(KeyboardInterrupt), insistent_interrupts(every=0.2):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
    time.sleep(0.5)  # nothing comes
