"""Speed of scoring and of a training step: request-level batching, user-item decoupling, arithmetic efficiency.

``python -m tests.benchmarks.scoring [--quick] [--device cuda] [--bf16]``: one process, preset `base`, T = 512, two
tasks, 16 features. Every ratio is the median over repeats of times taken side by side. --quick: `tiny`, T = 32, random
rows instead of MovieLens-100K: for correctness, not for speed. bf16 is measured where the processor computes in bf16,
or with --bf16 even where it is emulated.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from rich.console import Console
from rich.table import Table

from features.batch import Items, RequestBatch, Timeline, Users, collate
from features.sample_table import concatenate, cut
from features.schema import EventField, Feature, Schema, Sequence, Task
from models.losses import task_losses
from models.memory import keep_freed_memory
from models.profile import cost, on_meta
from models.protocol import RankingModel
from models.registry import build_model
from tests.benchmarks.measure import at_least, at_most, print_results, ratio, timed_together
from tests.models.batches import make_rows, make_schema
from tests.models.unshared import unshared

BATCH_CANDIDATES, BATCH_EVENTS = 1_500, 60_000
UNSHARED_BATCHES = (16, 32, 64)
"""Impressions per batch that the impression-level side may choose from; its fastest counts."""


@dataclass(frozen=True)
class Size:
    preset: str
    length: int
    candidates: tuple[int, ...]
    repeats: int
    gemm: int


FULL = Size("base", 512, (500, 2_000), repeats=11, gemm=2_048)
QUICK = Size("tiny", 32, (20, 40), repeats=2, gemm=128)


def scoring_schema(length: int) -> Schema:
    """Eight features a side, so that N_U = N_G, and a sequence of three fields; all 16 wide."""
    fields = tuple(EventField(name=name, buckets=10_000, dim=16) for name in ("item", "author", "action"))
    user = [Feature(name=f"user_{i}", side="user", buckets=10_000, dim=16) for i in range(8)]
    item = [Feature(name=f"item_{i}", side="item", buckets=10_000, dim=16) for i in range(8)]
    return Schema(
        features=(*user, *item),
        sequences=(Sequence(name="events", events="events", length=length, fields=fields),),
        tasks=(Task(name="finish"), Task(name="skip")),
    )


def one_request(schema: Schema, candidates: int, length: int) -> RequestBatch:
    """One request with a whole history, of random ids."""
    generator = torch.Generator().manual_seed(0)

    def ids(rows: int) -> torch.Tensor:
        return torch.randint(0, 10_000, (rows,), generator=generator)

    (sequence,) = schema.sequences
    ts = torch.arange(length) * 3_600_000_000
    names = np.array([str(one) for one in range(candidates)], dtype=object)
    return RequestBatch(
        timelines={
            "events": Timeline({one.name: ids(length) for one in sequence.fields}, ts, torch.tensor([0, length]))
        },
        users=Users(
            {one.name: ids(1) for one in schema.user_side},
            timeline=torch.tensor([0]),
            end={"events": torch.tensor([length])},
            ts=ts[-1:] + 1_000_000,
        ),
        items=Items({one.name: ids(candidates) for one in schema.item_side}, torch.tensor([0, candidates])),
        labels=torch.zeros(candidates, 2),
        label_mask=torch.ones(candidates, 2, dtype=torch.bool),
        weight=torch.ones(candidates),
        user_id=names[:1],
        request_id=names[:1],
        item_id=names,
    )


def computes_in_bf16(device: torch.device) -> bool:
    """Whether the processor has units for bf16, rather than emulating it."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "sve_bf16", "bf16"))


def measure_scoring(size: Size, dtype: torch.dtype, device: torch.device, table: Table) -> dict[str, float]:
    """All ratios of one request in one precision."""
    schema, name = scoring_schema(size.length), str(dtype).removeprefix("torch.")
    torch.manual_seed(0)
    ui, full = (build_model(schema, one, size.preset).to(device, dtype).eval() for one in ("ui-mixformer", "mixformer"))
    ui_meta, full_meta = (on_meta(schema, one, size.preset) for one in ("ui-mixformer", "mixformer"))
    square = torch.randn(size.gemm, size.gemm, device=device, dtype=dtype)
    results: dict[str, float] = {}
    for candidates in size.candidates:
        batch = one_request(schema, candidates, size.length).to(device)
        times = _time_request(ui, full, batch, square, size.repeats)
        flops = cost(full_meta, candidates).total / cost(ui_meta, candidates).total
        speedup = ratio(times["full"], times["ui"])
        rate = cost(ui_meta, candidates).items / times["score"] / (2 * size.gemm**3 / times["gemm"])
        memoised, efficiency = ratio(times["memoised"], times["score"]), float(np.median(rate))
        key, ms = f"{name}_{candidates}", {one: float(np.median(values)) * 1e3 for one, values in times.items()}
        results |= {
            f"{key}_full_ms": round(ms["full"], 2),
            f"{key}_ui_ms": round(ms["ui"], 2),
            f"{key}_score_ms": round(ms["score"], 2),
            f"{key}_ui_speedup": round(speedup, 3),
            f"{key}_ui_speedup_of_flop_ratio": round(speedup / flops, 3),
            f"{key}_memoised_over_score": round(memoised, 3),
            f"{key}_score_efficiency": round(efficiency, 3),
            f"{key}_gemm_gflops": round(float(np.median(2 * size.gemm**3 / times["gemm"])) / 1e9, 1),
        }
        table.add_row(
            f"{name}, {candidates:,} candidates: UI-MixFormer against N_U = 0, sequence shared in both",
            f"{ms['full']:.1f} → {ms['ui']:.1f} ms",
            f"{speedup:.2f}× (FLOPs {flops:.2f}×)",
        )
        table.add_row(
            f"{name}, {candidates:,} candidates: from a memoised UserState",
            f"{ms['memoised']:.1f} ms",
            f"{memoised:.2f}× of score; score runs at {efficiency:.0%} of GEMM",
        )
    return results | _against_impressions(size, ui, ui_meta, schema, name, device, table)


def _time_request(
    ui: RankingModel, full: RankingModel, batch: RequestBatch, square: torch.Tensor, repeats: int
) -> dict[str, np.ndarray]:
    state = ui.encode_users(batch.users, ui.encode_timelines(batch.timelines))
    memo = {"user": state}
    calls = {
        "full": lambda: full(batch),
        "ui": lambda: ui(batch),
        "score": lambda: ui.score(state, batch.items),
        "memoised": lambda: ui.score(memo["user"], batch.items),
        "gemm": lambda: square @ square.T,
    }
    return timed_together(calls, repeats, square.device)


def _against_impressions(
    size: Size, ui: RankingModel, ui_meta: RankingModel, schema: Schema, name: str, device: torch.device, table: Table
) -> dict[str, float]:
    """One request against as many separate impressions, each with its own copy of the sequence."""
    candidates = size.candidates[0]
    batch = one_request(schema, candidates, size.length)
    moved = batch.to(device)
    parts = {
        count: [
            unshared(batch, schema, torch.arange(candidates)[start : start + count]).to(device)
            for start in range(0, candidates, count)
        ]
        for count in UNSHARED_BATCHES
    }

    def run(part: list[RequestBatch]) -> torch.Tensor:
        return torch.cat([ui(one) for one in part])

    tolerance = 1e-4 if name == "float32" else 0.1
    torch.testing.assert_close(run(parts[32]), ui(moved), rtol=tolerance, atol=tolerance)
    # The impressions run for seconds; several requests in a row find the caches as a server does.
    in_a_row = 10
    calls: dict[str, Any] = {"request": lambda: [ui(moved) for _ in range(in_a_row)]}
    times = timed_together(
        calls | {str(count): lambda part=part: run(part) for count, part in parts.items()},  # type: ignore[misc]
        max(2, size.repeats // 4),
        device,
    )
    times["request"] /= in_a_row
    fastest = min(UNSHARED_BATCHES, key=lambda count: float(np.median(times[str(count)])))
    speedup = ratio(times[str(fastest)], times["request"])
    flops = candidates * cost(ui_meta, 1).total / cost(ui_meta, candidates).total
    table.add_row(
        f"{name}: one request ÷ {candidates:,} impressions in batches of {fastest}",
        f"{np.median(times[str(fastest)]) * 1e3:,.0f} ms → {np.median(times['request']) * 1e3:.1f} ms",
        f"{speedup:.0f}× (FLOPs {flops:.0f}×)",
    )
    return {
        f"{name}_impressions_speedup": round(speedup, 1),
        f"{name}_impressions_speedup_of_flop_ratio": round(speedup / flops, 3),
    }


def movielens_rows(folder: Path) -> tuple[pa.Table, Schema]:
    """The sample table of the MovieLens example, every row, shuffled."""
    from pipeline.importers.movielens import import_movielens
    from pipeline.runtime import stop_ray
    from pipeline.stages.samples import FOREVER, SAMPLES, sample_source
    from pipeline.stages.validated import VALIDATED
    from tests.benchmarks.movielens import example_workspace

    import_movielens(folder / "data")
    workspace = example_workspace(folder)
    try:
        VALIDATED.run(workspace, workspace.partitions)
        SAMPLES.run(workspace, workspace.partitions)
    finally:
        stop_ray()
    source = sample_source(workspace, 0, FOREVER)
    rows = concatenate([source.read(file) for file in source.files()])
    return rows.take(pa.array(np.random.default_rng(0).permutation(rows.num_rows))), source.schema


def measure_training(size: Size, quick: bool, device: torch.device, table: Table) -> dict[str, float]:
    """Candidates per second of a training step over shared timelines and of the same one impression by impression."""
    if quick:
        schema = make_schema(length=100)
        rows, what = make_rows(schema, 0, timelines=20), "random rows"
    else:
        with tempfile.TemporaryDirectory() as folder:
            rows, schema = movielens_rows(Path(folder))
        what = "MovieLens-100K"
    torch.manual_seed(0)
    model = build_model(schema, "ui-mixformer", size.preset).to(device).train()

    def step(batch: RequestBatch) -> None:
        model.zero_grad(set_to_none=True)
        loss, weight = task_losses(model(batch), batch.labels, batch.label_mask, batch.weight)
        (loss / weight.clamp(min=1)).sum().backward()

    batches = [collate(part, schema).to(device) for part in cut(rows, BATCH_CANDIDATES, BATCH_EVENTS)][:4]
    rng = np.random.default_rng(1)
    alone = {
        count: [
            unshared(batch, schema, torch.from_numpy(rng.choice(batch.candidates, min(count, batch.candidates), False)))
            for batch in batches
        ]
        for count in UNSHARED_BATCHES
    }
    calls = {"shared": lambda: [step(batch) for batch in batches]}
    calls |= {str(count): lambda part=part: [step(batch) for batch in part] for count, part in alone.items()}  # type: ignore[misc]
    times = timed_together(calls, max(2, size.repeats // 2), device)
    shared = sum(batch.candidates for batch in batches) / times["shared"]
    rates = {count: sum(batch.candidates for batch in part) / times[str(count)] for count, part in alone.items()}
    fastest = max(rates, key=lambda count: float(np.median(rates[count])))
    speedup = float(np.median(shared / rates[fastest]))
    table.add_row(
        f"float32: training step, {what}: shared timelines ÷ impressions in batches of {fastest}",
        f"{np.median(rates[fastest]):,.0f} → {np.median(shared):,.0f} candidates/s",
        f"{speedup:.1f}×",
    )
    key = "random_rows" if quick else "movielens"
    return {
        f"training_{key}_candidates_per_second": round(float(np.median(shared)), 1),
        f"training_{key}_speedup": round(speedup, 2),
    }


def goals(results: dict[str, float], size: Size) -> dict[str, Any]:
    """The goals of the full run."""
    first, second = size.candidates
    wanted: dict[str, Any] = {}
    for name, speedup, efficiency in (("float32", 1.6, 0.70), ("bfloat16", 1.7, 0.35)):
        wanted |= {
            f"{name}_{first}_ui_speedup": at_least(speedup, results.get(f"{name}_{first}_ui_speedup")),
            f"{name}_{second}_ui_speedup": at_least(1.8, results.get(f"{name}_{second}_ui_speedup")),
            f"{name}_{first}_score_efficiency": at_least(efficiency, results.get(f"{name}_{first}_score_efficiency")),
            f"{name}_impressions_speedup_of_flop_ratio": at_least(
                0.8, results.get(f"{name}_impressions_speedup_of_flop_ratio")
            ),
        }
        for candidates in size.candidates:
            share, memo = f"{name}_{candidates}_ui_speedup_of_flop_ratio", f"{name}_{candidates}_memoised_over_score"
            wanted[share] = at_least(0.9, results.get(share))
            wanted[memo] = at_most(1.05, results.get(memo))
    wanted["training_movielens_speedup"] = at_least(12.0, results.get("training_movielens_speedup"))
    return wanted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: for correctness, not for speed")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--bf16", action="store_true", help="measure bf16 even where the processor emulates it")
    options = parser.parse_args()
    keep_freed_memory()  # as the processes that train and serve do
    size, device = QUICK if options.quick else FULL, torch.device(options.device)
    table = Table("what", "time", "ratio", title=f"{size.preset}, T = {size.length}, {torch.get_num_threads()} threads")
    results: dict[str, float] = {}
    with torch.inference_mode():
        results |= measure_scoring(size, torch.float32, device, table)
        if options.bf16 or options.quick or computes_in_bf16(device):
            results |= measure_scoring(size, torch.bfloat16, device, table)
        else:
            table.add_row("bfloat16", "not measured", "this processor has no bf16 units (--bf16 measures anyway)")
    results |= measure_training(size, options.quick, device, table)
    Console(width=150).print(table)
    print_results("scoring", results, goals({} if options.quick else results, FULL))


if __name__ == "__main__":
    main()
