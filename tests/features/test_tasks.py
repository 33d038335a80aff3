"""Tasks over many calls: in order, a few at a time, and none that works on after a failure."""

from __future__ import annotations

import _thread
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import ray

from features.builder.plan import planned
from features.errors import CorankError, DataGateError, NoSpaceError, causes, known_cause, message_of, writing
from features.tasks import each, result_of, task

STEP = 0.1


def slow(folder: str, seconds: float) -> None:
    Path(folder, "begun").touch()
    time.sleep(seconds)
    Path(folder, "ended").touch()


def until_freed(folder: str) -> None:
    Path(folder, "begun").touch()
    while not Path(folder, "freed").exists():
        time.sleep(STEP)


def interrupt_when_begun(folder: Path, times: int) -> None:
    def interrupt() -> None:
        while not (folder / "begun").exists():
            time.sleep(STEP)
        for _ in range(times):
            _thread.interrupt_main()
            time.sleep(15 * STEP)  # Ray heeds a signal once in a second

    threading.Thread(target=interrupt).start()


@pytest.mark.timeout(120)
def test_after_an_interrupt_no_task_writes(tmp_path: Path, local_ray: None) -> None:
    interrupt_when_begun(tmp_path, times=1)
    with pytest.raises(KeyboardInterrupt):
        list(each(slow, [(str(tmp_path), 30 * STEP)], on_ray=True))
    assert (tmp_path / "ended").exists()


@pytest.mark.timeout(120)
def test_a_second_interrupt_waits_for_no_task(tmp_path: Path, local_ray: None) -> None:
    interrupt_when_begun(tmp_path, times=2)
    with pytest.raises(KeyboardInterrupt):
        list(each(until_freed, [(str(tmp_path),)], on_ray=True))  # returns: the task has not
    (tmp_path / "freed").touch()


@pytest.mark.timeout(120)
@pytest.mark.parametrize("plan", [False, True])
def test_after_a_failure_the_tasks_in_flight_have_ended(tmp_path: Path, local_ray: None, plan: bool) -> None:
    for number in range(3):
        folder = tmp_path / str(number)
        folder.mkdir()
        calls = [(str(folder), False), (str(folder), True)]
        with pytest.raises(ray.exceptions.RayError, match="it fails while another works"):
            list(planned("fails", works_or_fails, calls, None) if plan else each(works_or_fails, calls, on_ray=True))
        assert (folder / "ended").exists()


def works_or_fails(folder: str, fails: bool) -> None:
    """Fails once the other has begun."""
    if not fails:
        slow(folder, 5 * STEP)
        return
    while not Path(folder, "begun").exists():
        time.sleep(STEP / 10)
    raise ValueError("it fails while another works")


@pytest.mark.parametrize("on_ray", [False, True])
def test_results_come_in_the_order_of_the_calls(local_ray: None, on_ray: bool) -> None:
    calls = [(seconds,) for seconds in (0.3, 0.0, 0.1, 0.0, 0.0, 0.0, 0.0)]
    assert list(each(_wait, calls, on_ray)) == [seconds for (seconds,) in calls]


def _wait(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


def fail(error: BaseException) -> Any:
    raise error


def test_an_error_inside_a_task_is_what_was_raised_there(local_ray: None) -> None:
    with pytest.raises(DataGateError) as caught:
        result_of(task(fail).remote(DataGateError("table users: broken\nline two")))
    assert str(caught.value) == "table users: broken\nline two"
    with pytest.raises(ray.exceptions.RayTaskError) as unforeseen:
        result_of(task(fail).remote(ValueError("one\ntwo")))
    assert message_of(unforeseen.value) == "ValueError: one\ntwo"
    assert known_cause(unforeseen.value) is None


def test_causes_that_are_a_circle_end() -> None:
    inner, outer = ValueError("inner"), RuntimeError("outer")
    outer.__cause__, inner.__context__ = inner, outer
    assert list(causes(inner)) == [inner, outer]
    assert known_cause(inner) is None
    outer.__context__ = CorankError("what to do")
    outer.__suppress_context__ = False
    assert str(known_cause(inner)) == "what to do"


def test_errors_of_the_operating_system_say_where_and_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="Not a directory") as caught:
        (tmp_path / "file" / "in").mkdir()
    assert message_of(caught.value).startswith(f"{tmp_path}/file/in: Not a directory. A file lies where a folder")
    with pytest.raises(OSError, match="Is a directory") as caught:
        tmp_path.open()
    assert message_of(caught.value).startswith(f"{tmp_path}: Is a directory. A file lies where a folder")
    with pytest.raises(OSError, match="No space left") as caught, Path("/dev/full").open("wb", buffering=0) as full:
        full.write(b"1")
    assert "No space left on device. Free some of the disk" in message_of(caught.value)
    for said in (  # as SQLite, safetensors, Delta and Ray say it
        "(sqlite3.OperationalError) database or disk is full",
        'Error while serializing: IoError(Os { code: 28, kind: StorageFull, message: "No space left on device" })',
        "Generic LocalFileSystem error: Unable to copy data to file: No space left on device (os error 28)",
    ):
        with (
            pytest.raises(NoSpaceError, match=r"^/d/f: No space left on device for 1,000 bytes. Free some"),
            writing("/d/f", 1_000),
        ):
            raise RuntimeError("a task failed") from ValueError(said)
    denied = RuntimeError("Generic LocalFileSystem error: cannot open /x: Permission denied (os error 13)")
    assert "/x: Permission denied (os error 13). Give the user" in message_of(denied)
    assert message_of(PermissionError(13, "Permission denied", "/y")).startswith("/y: Permission denied. Give the user")
    assert message_of(AssertionError()) == "AssertionError"
