"""The commands ``corank features …``: what is registered and stored online, what the samples hold, and their export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.commands import skew, upkeep
from pipeline.commands.common import ConfigOption, DebugOption, guarded, load, open_workspace

if TYPE_CHECKING:
    from features.samples.source import SampleSource
    from features.store.online import FeatureStoreSettings
    from pipeline.progress import Line
    from pipeline.workspace import Workspace

features_app = typer.Typer(
    help="The feature store and the derived tables: look at them, check them, keep them in order.", no_args_is_help=True
)
upkeep.register(features_app)
skew.register(features_app)

PartitionsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--partition", "-p", help="A partition, e.g. 2026-01-05; may be given several times. Default: all built ones."
    ),
]
SHOWN_PARTITIONS = 5
WORTH_RAY = 32 << 20
"""Bytes of samples from which starting Ray takes less time than it saves."""


# --- the store ----------------------------------------------------------------------------------------


@features_app.command("list")
def features_list(config: ConfigOption, debug: DebugOption = False) -> None:
    """List what is registered in Feast: entities, views with their features and types, the service."""
    with guarded(debug):
        from pipeline.stages.feature_store import store_settings

        _print_registry(store_settings(open_workspace(load(config))))


@features_app.command("apply")
def features_apply(config: ConfigOption, debug: DebugOption = False) -> None:
    """Register the config's features in Feast and create their online tables. Doing it twice changes nothing."""
    with guarded(debug):
        from pipeline.leftovers import exclusive

        workspace = open_workspace(load(config))
        with exclusive(workspace.config), workspace.progress.stage("features") as stage:
            stage.say("registering")
            from features.store.online import apply
            from pipeline.stages.feature_store import registered_settings

            settings = registered_settings(workspace)
            stage.say(f"registered {', '.join(apply(settings))} in project {settings.project}")


@features_app.command("materialize")
def features_materialize(
    config: ConfigOption,
    until: Annotated[
        str | None,
        typer.Option(help="Fill up to the close of this partition only, e.g. 2026-01-05. Default: all closed ones."),
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Fill from the beginning, not only what is not up to date.")
    ] = False,
    debug: DebugOption = False,
) -> None:
    """Fill the online store with the newest profiles and sequences, as the stage feature_store of `corank run` does."""
    with guarded(debug):
        from pipeline.leftovers import exclusive
        from pipeline.stages.feature_store import FEATURE_STORE, ONLINE

        workspace = open_workspace(load(config), until)
        with exclusive(workspace.config):
            partitions = workspace.partitions if everything else FEATURE_STORE.stale(workspace)
            if not partitions:
                newest = workspace.partitions[-1]
                typer.echo(f"Nothing to do: the online store is up to date with the log up to {newest}.")
                return
            _require_built(workspace, partitions)
            rows = FEATURE_STORE.run(workspace, partitions)[ONLINE].rows
        for view, count in rows.items():
            typer.echo(f"{view:<28} {count:>12,} rows")


def _print_registry(settings: FeatureStoreSettings) -> None:
    from rich.table import Table

    from features.errors import CorankError
    from pipeline.progress import plain_console

    nothing = CorankError(
        f"nothing is registered in project {settings.project} ({settings.registry}); "
        "`corank features apply` registers the config's features, `corank run` does so too"
    )
    if "://" not in settings.registry and not Path(settings.registry).is_file():
        raise nothing  # opening the registry would create it
    from features.schema import SECOND
    from features.store.online import open_store
    from pipeline.workspace import close_text

    store = open_store(settings)
    views = sorted(store.list_feature_views(), key=lambda view: str(view.name))
    if not views:
        raise nothing
    table = Table(title=f"project {settings.project}")
    for column in ("view", "feature", "type"):
        table.add_column(column, no_wrap=True)
    for view in views:
        for row, feature in enumerate(view.features):
            table.add_row(view.name if row == 0 else "", feature.name, _type_text(feature.dtype))
        table.add_section()
    console = plain_console()
    needed = plain_console(width=1_000).measure(table).maximum  # no name is cut
    plain_console(width=max(console.width, needed)).print(table)
    for view in views:
        ends = [round(end.timestamp() * SECOND) for _, end in view.materialization_intervals]
        online = f"online up to {close_text(max(ends))}" if ends else "not online yet"
        source = view.batch_source.name if view.batch_source is not None else "–"
        about = f"of {', '.join(view.entities)}, from table {source}, {online}"
        console.print(f"view        {view.name}: {about}", soft_wrap=True)
    for entity in sorted(store.list_entities(), key=lambda entity: str(entity.name)):
        console.print(f"entity      {entity.name}, joined on {entity.join_key} ({entity.value_type.name.lower()})")
    for service in store.list_feature_services():
        named = ", ".join(projection.name for projection in service.feature_view_projections)
        console.print(f"service     {service.name}: {named}", soft_wrap=True)
    console.print(f"registry    {settings.registry}", soft_wrap=True)


def _type_text(kind: Any) -> str:
    inner = getattr(kind, "base_type", None)
    return f"list of {_type_text(inner)}" if inner is not None else str(kind).lower()


# --- the samples --------------------------------------------------------------------------------------


@features_app.command("stats")
def features_stats(
    config: ConfigOption,
    partition: PartitionsOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the statistics as JSON.")] = False,
    debug: DebugOption = False,
) -> None:
    """Count what the samples hold: coverage, history lengths, distinct ids, and what sharing histories saves."""
    with guarded(debug):
        from features.samples.statistics import sample_statistics

        workspace = open_workspace(load(config))
        source = _samples(workspace, partition)
        with workspace.progress.stage("statistics") as stage:
            _ray_for(source, workspace, stage)
            statistics = sample_statistics(source, lambda done, total: stage.say(f"{done}/{total} files"))
        figures = {"partitions": list(source.partitions), **statistics.describe(source.schema)}
        if as_json:
            typer.echo(json.dumps(figures))
        else:
            _print_statistics(figures)


@features_app.command("export")
def features_export(
    config: ConfigOption,
    target: Annotated[Path, typer.Option(help="Folder of the export; it appears when everything is written.")],
    partition: PartitionsOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export at --target.")] = False,
    raw: Annotated[
        bool, typer.Option("--raw", help="Numbers of `scale: log` as they are in the tables, not as log(1 + x).")
    ] = False,
    debug: DebugOption = False,
) -> None:
    """Write the samples as impression-level Parquet, to train any other library on exactly the same rows.

    One row per candidate: request_id, user_id, item_id, ts, feature__NAME, label__TASK (null: not known), weight, and
    the visible history as lists, history__SEQUENCE__FIELD and history__SEQUENCE__ts, oldest event first.
    In features and histories an id is a code (xxh64, 0: unknown) and a category its place in the vocabulary, from 1.
    A number of `scale: log` is log(1 + x), as the models read it; --raw gives x.
    """
    with guarded(debug):
        from features.samples.export import export_impressions
        from pipeline.leftovers import exclusive
        from pipeline.stages.samples import SAMPLES

        workspace = open_workspace(load(config))
        with exclusive(workspace.config):
            source = _samples(workspace, partition)
            candidates = {name: workspace.records.require(SAMPLES, name).candidates for name in source.partitions}
            with workspace.progress.stage("export") as stage:
                _ray_for(source, workspace, stage)
                result = export_impressions(
                    source,
                    target,
                    candidates,
                    overwrite,
                    lambda done, total: stage.say(f"{done}/{total} files"),
                    raw,
                )
                stage.say(f"{result.candidates:,} candidates in = {result.candidates:,} rows out, {result.files} files")
        for what, exported, samples in (
            ("Parquet on disk", result.parquet_bytes, result.sample_parquet_bytes),
            ("Arrow in memory", result.arrow_bytes, result.sample_arrow_bytes),
        ):
            typer.echo(
                f"{what:<16} {_size(exported)} flattened, {_size(samples)} as samples: {_times(exported, samples)}"
            )
        typer.echo(f"{'folder':<16} {target}")


def _ray_for(source: SampleSource, workspace: Workspace, stage: Line) -> None:
    """Start Ray, where it pays, or connect to the cluster."""
    from pipeline.runtime import ensure_ray

    if workspace.config.ray.address or source.size() > WORTH_RAY:
        stage.say("starting Ray")
        ensure_ray(workspace.config.ray)


def _samples(workspace: Workspace, chosen: list[str] | None) -> SampleSource:
    """The samples of the chosen partitions, or of all that are up to date.

    Raises:
        ConfigError: a chosen partition is not one of the log's closed ones.
        CorankError: a chosen partition is not built from the present log and config, or no partition is.
    """
    from features.errors import ConfigError, CorankError
    from pipeline.stages.samples import FOREVER, SAMPLES, kept, sample_source

    known, stale = workspace.partitions, set(SAMPLES.stale(workspace))
    if unknown := [name for name in chosen or [] if name not in known]:
        raise ConfigError(
            f"--partition {unknown[0]}: it has no rows or is not closed; "
            f"there are {len(known)} from {known[0]} to {known[-1]}"
        )
    built = [kept_partition for kept_partition in kept(workspace) if kept_partition not in stale]
    if not built:
        raise CorankError("no samples are built from this log and config yet; `corank run` builds them")
    partitions = sorted(set(chosen)) if chosen else built
    if retired := sorted(set(partitions) - set(kept(workspace))):
        raise CorankError(f"table samples, partition {retired[0]}: `retention` has dropped its samples")
    _require_built(workspace, partitions)
    if not chosen and stale:
        workspace.progress.note(f"{len(stale)} of {len(known)} partitions are not built yet and left out")
    return sample_source(workspace, 0, FOREVER, tuple(partitions))


def _require_built(workspace: Workspace, partitions: list[str]) -> None:
    from features.errors import CorankError
    from pipeline.stages.samples import SAMPLES

    stale = set(SAMPLES.stale(workspace))
    if missing := [partition for partition in partitions if partition in stale]:
        named = ", ".join(missing[:SHOWN_PARTITIONS]) + (" …" if len(missing) > SHOWN_PARTITIONS else "")
        raise CorankError(
            f"table samples: {len(missing)} of {len(partitions)} partitions are not built from the present log and "
            f"config: {named}. `corank run` builds them."
        )


def _print_statistics(figures: dict[str, Any]) -> None:
    from rich.table import Table

    from pipeline.progress import plain_console

    console, partitions = plain_console(), figures["partitions"]
    features = Table("feature", "side", "kind", "coverage", "distinct", "of ids", "unique", title="features")
    for name, feature in figures["features"].items():
        features.add_row(name, feature["side"], feature["kind"], *_value_cells(feature))
    sequences = Table("sequence", "field", "kind", "coverage", "distinct", "of ids", "unique", title="sequences")
    lengths = Table("sequence", "L", "requests with events", "p50", "p90", "p99", "max", title="visible events")
    for name, sequence in figures["sequences"].items():
        for row, (field, counts) in enumerate(sequence["fields"].items()):
            sequences.add_row(name if row == 0 else "", field, counts["kind"], *_value_cells(counts))
        quantiles = ["–" if value is None else str(value) for value in sequence["visible_events"].values()]
        lengths.add_row(name, str(sequence["length"]), _share(sequence["coverage"]), *quantiles)
    for table in (features, sequences, lengths):
        console.print(table)
    bytes_, rows = figures["bytes"], (figures["timelines"], figures["requests"], figures["candidates"])
    console.print(f"partitions  {len(partitions)}, {partitions[0]} … {partitions[-1]}")
    console.print("rows        {:,} timelines, {:,} requests, {:,} candidates".format(*rows))
    console.print(
        f"sharing     {_number(figures['candidates_per_request'])} candidates per request, "
        f"{_number(figures['requests_per_timeline'])} requests per timeline"
    )
    flattened, estimated = bytes_["flattened_arrow_computed"], bytes_["flattened_parquet_estimated"] or 0
    sampled = f"estimated from {bytes_['estimated_from_candidates']:,} candidates"
    for what, samples, exported, how in (
        ("Arrow", bytes_["sample_arrow"], flattened, "computed"),
        ("Parquet", bytes_["sample_parquet"], estimated, sampled),
    ):
        sizes = f"{_size(samples)} as samples, {_size(exported)} flattened ({how}): {_times(exported, samples)}"
        console.print(f"{what:<11} {sizes}", soft_wrap=True)


def _value_cells(counts: dict[str, Any]) -> list[str]:
    """Coverage, distinct ids, ids and their ratio, as cells of a table."""
    if "ids" not in counts:
        return [_share(counts["coverage"]), "", "", ""]
    return [
        _share(counts["coverage"]),
        f"{counts['distinct']:,}",
        f"{counts['ids']:,}",
        "–" if counts["unique_ratio"] is None else f"{counts['unique_ratio']:.4f}",
    ]


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _size(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:,.1f} {unit}"
        size /= 1024
    return f"{size:,.1f} GiB"


def _times(part: int, whole: int) -> str:
    return f"{part / whole:.1f} ×" if whole else "–"
