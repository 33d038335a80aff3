"""The benchmarks that need no data from outside run, and end with a line of JSON.

Not those that walk through whole commands, or start a service again and again, for minutes: ``retraining``,
``crashwalk`` and ``serving``. What they show in bulk has tests of its own (test_dag.py, test_cuts.py, test_resume.py,
test_repair.py, tests/serving/).
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest


def report_of(benchmark: str, timeout: float) -> dict[str, Any]:
    """What the benchmark prints last with --quick; a benchmark that fails fails the test."""
    command = [sys.executable, "-W", "ignore", "-m", f"tests.benchmarks.{benchmark}", "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert report["benchmark"] == benchmark
    assert all(value > 0 for name, value in report["results"].items() if name != "growth_exponent")
    assert all(goal["holds"] is None for goal in report["goals"].values())  # --quick says nothing about speed
    return report


@pytest.mark.slow
def test_the_scoring_benchmark_runs_and_reports_every_goal() -> None:
    report = report_of("scoring", timeout=240)
    assert report["results"]["training_random_rows_candidates_per_second"] > 0
    assert "float32_500_ui_speedup" in report["goals"]


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_the_features_benchmark_agrees_with_one_polars_program_and_reports_every_goal() -> None:
    report = report_of("features", timeout=180)  # it ends with an error where a row differs
    results = report["results"]
    assert results["historical_delta_rows_right"] == 20_000
    assert results["flattened_over_samples_arrow"] > 1
    assert set(report["goals"]) >= {"speed_of_polars", "growth_exponent", "flattened_over_samples_parquet"}


@pytest.mark.slow
@pytest.mark.timeout(150)
def test_the_long_log_benchmark_builds_together_what_it_builds_day_by_day() -> None:
    report = report_of("longlog", timeout=140)  # it ends with an error where a row differs
    assert set(report["goals"]) == {"build_seconds", "validation_seconds"}
