"""Timing of calls beside each other, and the line of JSON that every benchmark ends with."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch


def timed_together(
    calls: Mapping[str, Callable[[], Any]], repeats: int, device: torch.device | str = "cpu"
) -> dict[str, np.ndarray]:
    """Seconds of every call, [repeats]; each repeat runs all of them, so that they meet the same noise."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(repeats):
        for name, call in calls.items():
            _wait(device)
            started = time.perf_counter()
            call()
            _wait(device)
            seconds[name].append(time.perf_counter() - started)
    return {name: np.array(values) for name, values in seconds.items()}


def ratio(slower: np.ndarray, faster: np.ndarray) -> float:
    """Median over the repeats of how many times as long the first took."""
    return float(np.median(slower / faster))


def at_least(bound: float, value: float | None) -> dict[str, Any]:
    """A goal; without a value (not measured here) it neither holds nor fails."""
    return {"goal": f">= {bound}", "value": value, "holds": None if value is None else value >= bound}


def at_most(bound: float, value: float | None) -> dict[str, Any]:
    return {"goal": f"<= {bound}", "value": value, "holds": None if value is None else value <= bound}


def print_results(benchmark: str, results: Mapping[str, Any], goals: Mapping[str, Any]) -> None:
    """The last line of a benchmark's output."""
    print(json.dumps({"benchmark": benchmark, "results": dict(results), "goals": dict(goals)}))


def _wait(device: torch.device | str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
