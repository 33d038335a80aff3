"""What ``corank models profile`` prints."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table

from features.errors import ConfigError
from features.schema import Schema
from models.mixformer.model import MixFormer
from models.profile import (
    PAPER_RATIO,
    cost,
    decoupling_ratios,
    dense_parameters,
    industrial_schema,
    on_meta,
    paddings,
    sharing_for,
)
from models.registry import MODELS, find_preset
from pipeline.progress import plain_console

SHARING = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000)
"""Candidates per request of the decoupling table."""


def print_profile(preset: str, candidates: int, length: int, schema: Schema | None) -> None:
    """Print parameters, FLOPs and state sizes of a preset.

    Args:
        schema: features, sequences and tasks; default: of the papers' kind.

    Raises:
        ConfigError: there is no such preset, or it does not fit the schema.
    """
    try:
        name, size = find_preset(preset)
        given = schema or industrial_schema(sequences=MODELS[name].paper_sequences)
        sequences = [sequence.model_copy(update={"length": length}) for sequence in given.sequences]
        given = given.model_copy(update={"sequences": tuple(sequences)})
        model = on_meta(given, name, size)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    console = plain_console()
    total = sum(parameter.numel() for parameter in model.parameters())
    dense = dense_parameters(model)
    origin = "schema of the papers' kind" if schema is None else "schema of the config"
    console.print(
        f"{name} {size}, {origin}: {dense / 1e6:,.1f}M dense parameters, {(total - dense) / 1e6:,.1f}M in embeddings"
    )
    for label, padding in paddings(model).items():
        if padding:
            console.print(f"{label}: padded by {padding} zeros to split evenly (eq. 2)")
    ours, alone = cost(model, candidates), cost(model, 1)
    table = Table(title=f"GFLOPs of one request: {candidates:,} candidates, {length:,} events per sequence")
    for column, justify in (("", "left"), ("request-level batching", "right"), ("every candidate alone", "right")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    rows: Iterable[tuple[str, int, int]] = (
        ("user side: timelines", ours.timelines, alone.timelines * candidates),
        ("user side: request", ours.users, alone.users * candidates),
        ("item side: candidates", ours.items, alone.items * candidates),
        ("total", ours.total, alone.total * candidates),
    )
    for label, shared, unshared in rows:
        table.add_row(label, f"{shared / 1e9:,.2f}", f"{unshared / 1e9:,.2f}", end_section=label.startswith("item"))
    console.print(table)
    console.print(
        f"states, fp32: TimelineState {ours.timeline_bytes:,} bytes, UserState {ours.user_bytes:,} bytes beside it"
    )
    if isinstance(model, MixFormer):
        _print_decoupling(console, given, size, length)


def _print_decoupling(console: Console, schema: Schema, size: str, length: int) -> None:
    decoupled, full = on_meta(schema, "ui-mixformer", size), on_meta(schema, "mixformer", size)
    assert isinstance(decoupled, MixFormer)
    heads = f"N_U = {decoupled.user_heads} of {decoupled.config.heads}"
    table = Table(title=f"FLOPs of UI-MixFormer ({heads}) ÷ MixFormer, {size}")
    for column in ("candidates per request", "both batched by request", "MixFormer not batched"):
        table.add_column(column, justify="right")
    batched, unbatched = sharing_for(PAPER_RATIO, decoupled, full, length)
    lines: list[tuple[float, str, str, str]] = [
        (sharing.candidates, f"{sharing.candidates:,}", f"{sharing.batched:.3f}", f"{sharing.unbatched:.4f}")
        for sharing in decoupling_ratios(decoupled, full, list(SHARING), length)
    ]
    paper = f"{PAPER_RATIO} (the paper's)"
    lines += [(batched, f"{batched:,.1f}", paper, "")] if batched is not None else []
    lines += [(unbatched, f"{unbatched:,.2f}", "", paper)] if unbatched is not None else []
    for _, *cells in sorted(lines):
        table.add_row(*cells)
    console.print(table)
    together = f"at {batched:,.0f} candidates per request" if batched is not None else "at no number of candidates"
    apart = f"at {unbatched:,.2f}" if unbatched is not None else "at none"
    console.print(
        f"The paper's {PAPER_RATIO} (2,242 of 3,503 GFLOPs, table 1) is reached {together} when both are batched, "
        f"{apart} when MixFormer is not."
    )
