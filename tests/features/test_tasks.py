"""Tasks over many calls: in order, a few at a time, and none that works on after an interrupt."""

from __future__ import annotations

import _thread
import threading
import time
from pathlib import Path

import pytest

from features.tasks import each

STEPS, STEP = 40, 0.1


def slow(folder: str) -> None:
    Path(folder, "begun").touch()
    for _ in range(STEPS):
        time.sleep(STEP)
    Path(folder, "ended").touch()


@pytest.mark.timeout(120)
def test_an_interrupt_ends_the_task_that_is_waited_for(tmp_path: Path, local_ray: None) -> None:
    def interrupt() -> None:
        while not (tmp_path / "begun").exists():
            time.sleep(STEP)
        _thread.interrupt_main()

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        list(each(slow, [(str(tmp_path),)], on_ray=True))
    time.sleep(STEPS * STEP)
    assert not (tmp_path / "ended").exists()


@pytest.mark.parametrize("on_ray", [False, True])
def test_results_come_in_the_order_of_the_calls(local_ray: None, on_ray: bool) -> None:
    calls = [(seconds,) for seconds in (0.3, 0.0, 0.1, 0.0, 0.0, 0.0, 0.0)]
    assert list(each(_wait, calls, on_ray)) == [seconds for (seconds,) in calls]


def _wait(seconds: float) -> float:
    time.sleep(seconds)
    return seconds
