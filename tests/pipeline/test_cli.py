"""The command line: help is fast, exit codes mean what they say, errors need no stack trace."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

from pipeline.importers.synthetic import import_synthetic
from tests.pipeline.commands import corank
from tests.pipeline.workspaces import START, write_config
from tests.servers import free_port, http_server

COMMAND = [sys.executable, "-c", "from pipeline.cli import main; main()"]
COMMANDS = [
    [],
    ["run"],
    ["retrain"],
    ["validate"],
    ["serve"],
    ["query"],
    ["status"],
    ["report"],
    ["models"],
    ["models", "profile"],
    ["features"],
    ["features", "forget"],
    ["import"],
    ["features"],
    ["features", "export"],
]


def process(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command) or "corank")
def test_help_answers_without_heavy_imports(command: list[str]) -> None:
    code = (
        "import sys\nsys.argv = ['corank', *sys.argv[1:], '--help']\nfrom pipeline.cli import main\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert stop.code == 0\n"
        "heavy = {'ray', 'torch', 'feast', 'great_expectations', 'dagster', 'mlflow', 'polars', 'pandas', 'plotly'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *command], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout


def test_under_another_locale_files_are_utf8_and_the_terminal_stays_as_it_is() -> None:
    code = (
        "import sys, pipeline.cli, pipeline.commands.app\n"
        "said = sys.flags.utf8_mode, open(sys.executable).encoding, sys.argv, chr(0x2713)\n"
        "pipeline.commands.app.app = lambda: print(*said)\n"
        "pipeline.cli.main()\n"
    )
    latin = os.environ | {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    latin.pop("PYTHONIOENCODING", None)
    done = subprocess.run([sys.executable, "-c", code, "größe"], capture_output=True, env=latin, check=True, timeout=60)
    assert done.stdout.decode("ascii") == "1 utf-8 ['-c', 'gr??e'] ?\n"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "data"
    import_synthetic(folder, days=2, users=30, items=40, seed=4, start=START, buckets=2, say=lambda _: None)
    return folder


def test_a_wrong_config_exits_2_without_a_stack_trace(tmp_path: Path, data: Path) -> None:
    path = write_config(tmp_path, data, grain="fortnight")
    done = process("run", "--config", str(path))
    assert done.returncode == 2
    assert "grain" in done.stderr
    assert "'fortnight'" in done.stderr
    assert "Traceback" not in done.stderr
    assert process("run", "--config", str(tmp_path / "none.yaml")).returncode == 2
    assert process("run", "--confg").returncode == 2


def test_an_unforeseen_error_in_a_stage_names_stage_and_place_and_shows_its_trace_only_when_asked(
    tmp_path: Path, data: Path
) -> None:
    """Dagster raises what a stage raised from its own error, whose cause that is: a circle."""
    path = write_config(tmp_path, data)
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "great_expectations").touch()  # where a folder goes
    done = corank("run", "--config", str(path), "--debug")
    assert done.exit_code == 1
    trace, _, message = done.stderr.partition("error: ")
    assert "Traceback" in trace
    assert "Traceback" not in message
    assert message.startswith(f"stage validated: {tmp_path}/work/great_expectations: File exists. A file lies where")


def test_a_port_that_another_program_has_is_named_before_anything_runs(tmp_path: Path, data: Path) -> None:
    with http_server("127.0.0.1", "no JSON") as (_, port):
        done = corank("run", "--config", str(write_config(tmp_path, data, serving={"port": port})))
    assert done.exit_code == 1
    assert f"cannot listen on 127.0.0.1:{port}" in done.stderr
    tokens = tmp_path / "tokens"
    tokens.touch(0o600)
    tokens.write_text("shop 0123456789abcdef")
    serving = {"host": "192.0.2.1", "tokens": str(tokens)}
    elsewhere = corank("run", "--config", str(write_config(tmp_path, data, serving=serving)))
    assert elsewhere.exit_code == 1
    assert "cannot listen on 192.0.2.1:8000" in elsewhere.stderr
    assert not (tmp_path / "work" / "tables").exists()


def test_tokens_that_cannot_be_used_are_named_before_anything_runs(tmp_path: Path, data: Path) -> None:
    tokens, port = tmp_path / "tokens", free_port()
    tokens.write_text("shop 7c1e0f2ab93d4c55")
    tokens.chmod(0o644)
    config = write_config(tmp_path, data, serving={"port": port, "tokens": str(tokens)})
    done = corank("run", "--config", str(config))
    assert done.exit_code == 1
    assert f"{tokens} can be read by other users" in done.stderr
    assert not list((tmp_path / "work").glob("records/validated/*"))
    # nor is an endpoint taken for this pipeline's that takes none of them
    tokens.chmod(0o600)
    refusal = '{"error": {"type": "unauthorized", "field": null, "message": "none of those"}}'
    with http_server("127.0.0.1", refusal, status=401) as (asked, taken):
        config = write_config(tmp_path, data, serving={"port": taken, "tokens": str(tokens)})
        done = corank("run", "--config", str(config))
    assert done.exit_code == 1
    assert "takes no token of serving.tokens, so it is another pipeline's" in done.stderr
    assert asked == ["/v1/model"]
    assert not list((tmp_path / "work").glob("records/validated/*"))


@pytest.mark.slow
def test_bad_data_exits_3_names_it_and_leaves_nothing_visible(tmp_path: Path, data: Path) -> None:
    import shutil

    own = tmp_path / "data"
    shutil.copytree(data, own)
    bad = pl.read_delta(str(own / "impressions")).filter(pl.col("dt") == "2026-01-06").head(2)
    bad = bad.with_columns(pl.lit(7, pl.Int8).alias("click"), pl.lit("x").alias("request_id"))
    bad.write_delta(str(own / "impressions"), mode="append")
    path = write_config(tmp_path, own)
    done = corank("run", "--config", str(path))
    assert done.exit_code == 3, done.stderr
    assert done.stderr.count("table impressions, partition 2026-01-06: 2 of") == 1
    assert done.stderr.count("label click outside {0, 1}") == 1
    assert "✗ validated" in done.stderr
    assert "✓ validated" not in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "work" / "tables").exists()
    assert corank("validate", "--config", str(path), "--partition", "2026-01-05").exit_code == 0
    assert corank("validate", "--config", str(path), "--partition", "2026-02-01").exit_code == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"users": None}, "table users: there is no Delta table"),
        ({"impressions": "drop"}, "column device is missing"),
        ({"impressions": "cast"}, "column click has type"),
    ],
    ids=["missing table", "missing column", "mistyped column"],
)
def test_missing_tables_and_columns_exit_3_before_anything_starts(
    tmp_path: Path, data: Path, change: dict[str, str | None], message: str
) -> None:
    import shutil

    own = tmp_path / "data"
    shutil.copytree(data, own)
    for table, kind in change.items():
        if kind is None:
            shutil.rmtree(own / table)
        else:
            frame = pl.read_delta(str(own / table))
            frame = frame.drop("device") if kind == "drop" else frame.with_columns(pl.col("click").cast(pl.String))
            shutil.rmtree(own / table)
            frame.write_delta(str(own / table), delta_write_options={"partition_by": ["dt", "bucket"]})
    done = corank("run", "--config", str(write_config(tmp_path, own)))
    assert done.exit_code == 3, done.stderr
    assert message in done.stderr
    assert not (tmp_path / "work" / "tables").exists()


def test_a_missing_day_inside_the_log_is_named(tmp_path: Path, local_ray: None) -> None:
    own = tmp_path / "data"
    import_synthetic(own, days=3, users=20, items=30, seed=4, start=START, buckets=2, say=lambda _: None)
    from deltalake import DeltaTable

    DeltaTable(str(own / "impressions")).delete("dt = '2026-01-06'")
    done = corank("run", "--config", str(write_config(tmp_path, own)))
    assert done.exit_code == 3, done.stderr
    assert "partition 2026-01-06" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["run", "--until", "soon"], "--until: partition 'soon' is not a day"), (["retrain"], "corank run")],
)
def test_wrong_partitions_are_named(tmp_path: Path, data: Path, arguments: list[str], message: str) -> None:
    done = corank(*arguments, "--config", str(write_config(tmp_path, data)))
    assert done.exit_code in (1, 2)
    assert message in done.stderr


def test_a_partition_in_the_future_is_named(tmp_path: Path, local_ray: None) -> None:
    own = tmp_path / "data"
    import_synthetic(own, days=1, users=20, items=30, seed=4, start="2100-01-04", buckets=2, say=lambda _: None)
    done = corank("run", "--config", str(write_config(tmp_path, own)))
    assert done.exit_code == 3, done.stderr
    assert "table impressions, partition 2100-01-04" in done.stderr
    assert "in the future" in done.stderr


def test_asking_before_anything_runs_says_what_to_do(tmp_path: Path, data: Path) -> None:
    path = write_config(tmp_path, data)
    hints = {"query": "no deployment yet"} | dict.fromkeys(("serve", "retrain", "report"), "corank run")
    for command, hint in hints.items():
        done = corank(command, "--config", str(path))
        assert done.exit_code in (1, 2), done.stderr
        assert hint in done.stderr
    done = corank("status", "--config", str(path))
    assert done.exit_code == 0, done.stderr
    assert "2 closed partitions" in done.stdout


def test_models_profile_prints_sizes_and_where_the_papers_ratio_lies() -> None:
    done = corank("models", "profile", "mixformer-medium", "--candidates", "200", "--length", "100")
    assert done.exit_code == 0, done.stderr
    for part in ("dense parameters", "200 candidates, 100 events", "request-level batching", "0.64", "UserState"):
        assert part in done.stdout
    own = corank("models", "profile", "hyformer-tiny", "--config", "pipeline/examples/synthetic.yaml")
    assert own.exit_code == 0, own.stderr
    assert "schema of the config" in own.stdout


def test_an_unknown_preset_exits_2_and_lists_what_there_is() -> None:
    done = corank("models", "profile", "mixformer-huge")
    assert done.exit_code == 2
    assert "mixformer-medium" in done.stderr
    assert "Traceback" not in done.stderr
