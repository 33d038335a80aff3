"""Every benchmark that needs no data from outside runs, and ends with a line of JSON."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_the_scoring_benchmark_runs_and_reports_every_goal() -> None:
    command = [sys.executable, "-W", "ignore", "-m", "tests.benchmarks.scoring", "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["benchmark"] == "scoring"
    assert report["results"]["training_random_rows_candidates_per_second"] > 0
    assert all(value > 0 for value in report["results"].values())
    assert "float32_500_ui_speedup" in report["goals"]
    assert all(goal["holds"] is None for goal in report["goals"].values())  # --quick says nothing about speed
