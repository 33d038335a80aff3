"""The builder's work as plans of Ray Data: a source whose read tasks fold, write files, and return records of them.

Rows stay where they are made and only a record per file travels, so that a plan needs no shuffle and no space in the
object store. The driver reads the records as they come, and commits.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import Any, ClassVar

import pyarrow as pa
import ray
import ray.data
from ray.data import DataContext
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from features.errors import known_cause
from features.tasks import wait_for_end

RETRIES = 3
"""How often a task is repeated when its worker or node died; Ray Data's own default is without limit."""


def planned(
    name: str, function: Callable[..., Any], calls: Sequence[tuple[Any, ...]], at_once: int | None
) -> Generator[tuple[int, Any]]:
    """``function(*call)`` of every call, in the read tasks of one plan, as they end: the call's number, and the result.

    When it fails or is given up, the tasks that ran have ended when this returns, if they end within ``LAST_SECONDS``.

    Args:
        name: of the plan, in Ray's dashboard.
        at_once: tasks that run at a time; None: as many as there are CPUs.

    Raises:
        CorankError: as it was raised in a task.
    """
    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = False
    context.custom_execution_callback_classes = [_Uncancelled]
    with DataContext.current(context):
        data = ray.data.read_datasource(
            _Calls(name, function, calls),
            num_cpus=1,
            concurrency=at_once,
            override_num_blocks=len(calls),
            ray_remote_args={"max_retries": RETRIES},
        )
    try:
        for block in data.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            for result in block["result"]:
                yield pickle.loads(result.as_py())
    except ray.exceptions.RayError as failure:
        raise known_cause(failure) or failure from None
    finally:
        _Uncancelled.end()


class _Calls(Datasource):
    """A read task per call; its one row is the call's number and result."""

    def __init__(self, name: str, function: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._name, self._function, self._calls = name, function, calls

    def get_name(self) -> str:
        return self._name

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: DataContext | None = None
    ) -> list[ReadTask]:
        unknown = BlockMetadata(num_rows=1, size_bytes=None, input_files=None, exec_stats=None)
        return [
            ReadTask(partial(_call, self._function, number, call), unknown) for number, call in enumerate(self._calls)
        ]


def _call(function: Callable[..., Any], number: int, call: tuple[Any, ...]) -> list[pa.Table]:
    return [pa.table({"result": pa.array([pickle.dumps((number, function(*call)))], pa.large_binary())})]


class _Uncancelled(ExecutionCallback):  # type: ignore[misc]  # Ray's class has no types
    """Waits for the tasks of a plan that failed or was given up; Ray Data would cancel them and not wait.

    One plan at a time in a process: Ray Data makes the objects of this class.
    """

    executor: ClassVar[Any] = None

    def before_execution_starts(self, executor: Any) -> None:
        _Uncancelled.executor = executor
        for operator in executor._topology:
            operator._cancel_active_tasks = partial(self._wait, operator)

    @staticmethod
    def _wait(operator: Any, force: bool) -> None:
        waitables = (task.get_waitable() for task in operator.get_active_tasks())
        wait_for_end([getattr(waitable, "_generator_ref", waitable) for waitable in waitables])

    @staticmethod
    def end() -> None:
        """Close the newest plan, if it is not closed yet."""
        if _Uncancelled.executor is not None:
            _Uncancelled.executor.shutdown(force=False)
        _Uncancelled.executor = None
