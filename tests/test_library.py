"""The parts work alone, in a notebook: without Ray, Feast and MLflow, and as docs/notebook.md shows it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.importers.synthetic import import_synthetic
from pipeline.progress import Progress
from pipeline.stages.samples import build_settings
from pipeline.workspace import Workspace
from tests.features.worlds import fold_all
from tests.pipeline.workspaces import START, load

PAGE = Path(__file__).parents[1] / "docs" / "notebook.md"


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


def test_the_public_names_load_neither_ray_nor_feast_nor_mlflow() -> None:
    check = "import sys; print(sorted({'ray', 'feast', 'mlflow'} & set(sys.modules)))"
    run = subprocess.run(
        [sys.executable, "-c", blocks()[0] + check], capture_output=True, text=True, timeout=100, check=False
    )
    assert run.stdout.strip() == "[]", run.stderr


def test_the_page_trains_a_model_on_the_samples_of_a_workspace(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import_synthetic(tmp_path / "data", days=3, users=30, items=30, seed=2, start=START, buckets=1, say=lambda _: None)
    workspace = Workspace(load(tmp_path, tmp_path / "data", buckets=1), Progress())
    fold_all(build_settings(workspace), workspace.partitions, [])
    example = "pipeline/examples/movielens.yaml"
    code = blocks()[1]
    assert example in code
    exec(code.replace(example, str(tmp_path / "config.yaml")), {})
    first, second = re.findall(r"loss (\d+\.\d+)", capsys.readouterr().out)
    assert 0 < float(second) < 10
    assert first != second
