"""Quality of the example run: the tiny UI-MixFormer against the baseline, on held-out requests, in three seeds.

``python -m tests.benchmarks.movielens [--quick]``: imports MovieLens-100K into a temporary folder, runs validation,
samples, training and evaluation once per seed (--quick: one seed, one epoch) and prints AUC differences with 95 %
intervals over resampled users.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pipeline.config import load_config
from pipeline.importers.movielens import import_movielens
from pipeline.progress import Progress
from pipeline.runtime import quiet, stop_ray
from pipeline.stages.challenger import CHALLENGER
from pipeline.stages.evaluation import EVALUATION
from pipeline.stages.samples import SAMPLES
from pipeline.stages.validated import VALIDATED
from pipeline.workspace import Workspace
from tests.benchmarks.measure import print_results
from tests.pipeline.workspaces import make

EXAMPLE = "pipeline/examples/movielens.yaml"


def example_workspace(folder: Path) -> Workspace:
    """The workspace of the MovieLens example in ``folder/work``, on tables in ``folder/data``."""
    config = load_config(EXAMPLE)
    tables = {name: one.model_copy(update={"path": f"{folder}/data/{name}"}) for name, one in config.tables.items()}
    return Workspace(config.model_copy(update={"tables": tables, "workspace": f"{folder}/work"}), Progress())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one seed, one epoch: for correctness, not for quality")
    parser.add_argument("--source", type=Path, default=None, help="folder or zip of MovieLens-100K")
    quick, source = parser.parse_args().quick, parser.parse_args().source
    quiet()
    table = Table("seed", "AUC", "UAUC", "baseline AUC", "difference", "95 %", "training seconds")
    lowest, results = float("inf"), {}
    with tempfile.TemporaryDirectory() as folder:
        import_movielens(Path(folder, "data"), source)
        try:
            for seed in range(1 if quick else 3):
                os.environ["CORANK_TRAINING__SEED"] = str(seed)
                if quick:
                    os.environ["CORANK_TRAINING__EPOCHS"] = "1"
                workspace = example_workspace(Path(folder))
                if seed == 0:
                    VALIDATED.run(workspace, workspace.partitions)
                    SAMPLES.run(workspace, workspace.partitions)
                started = time.monotonic()
                make(CHALLENGER, workspace)
                seconds = time.monotonic() - started
                entry = make(EVALUATION, workspace).tasks["finish"]
                gain = entry["auc_gain_over_baseline"]
                lowest = min(lowest, gain["low"])
                results[f"auc_seed_{seed}"] = round(entry["auc"], 4)
                results[f"uauc_seed_{seed}"] = round(entry["uauc"], 4)
                results[f"training_seconds_seed_{seed}"] = round(seconds, 1)
                results["baseline_auc"] = round(entry["baseline"]["auc"], 4)
                table.add_row(
                    str(seed),
                    f"{entry['auc']:.4f}",
                    f"{entry['uauc']:.4f}",
                    f"{entry['baseline']['auc']:.4f}",
                    f"{gain['difference']:+.4f}",
                    f"{gain['low']:+.4f} … {gain['high']:+.4f}",
                    f"{seconds:.0f}",
                )
        finally:
            stop_ray()
    Console().print(table)
    goal = {"goal": "> 0", "value": round(lowest, 4), "holds": lowest > 0}
    print_results("movielens", results, {"lowest_lower_bound_of_auc_difference": goal})
    sys.exit(0 if lowest > 0 or quick else 1)


if __name__ == "__main__":
    main()
