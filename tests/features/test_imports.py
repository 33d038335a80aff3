"""What a process loads: a build worker holds rows, not tensors."""

from __future__ import annotations

import subprocess
import sys

WITHOUT_TORCH = (
    "features.builder.build",
    "features.delta.maintenance",
    "features.samples.export",
    "features.samples.source",
    "features.samples.statistics",
    "features.validation.gate",
    "features.validation.rules",
)
"""What builds, validates, reads and exports data. Feast imports torch by itself; its process is not a worker."""


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=True).stdout


def test_what_builds_validates_and_exports_data_does_not_load_torch() -> None:
    code = f"import sys, {', '.join(WITHOUT_TORCH)}; print(sorted({{'torch', 'feast', 'mlflow'}} & set(sys.modules)))"
    assert run(code).strip() == "[]"
