"""A mistake in the config is answered with the file, the key, the value and what is allowed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from features.errors import ConfigError
from pipeline.config import load_config

EXAMPLES = sorted(Path("pipeline/examples").glob("*.yaml"))


def changed(tmp_path: Path, **changes: Any) -> Path:
    content = yaml.safe_load(EXAMPLES[0].read_text())
    for key, value in changes.items():
        node = content
        *parents, last = key.split("__")
        for parent in parents:
            node = node.setdefault(parent, {}) if isinstance(node, dict) else node[int(parent)]
        if value is None:
            del node[last]
        else:
            node[last] = value
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_examples_are_valid(path: Path) -> None:
    assert load_config(path).name == path.stem


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"training__epoch": 3}, ["training.epoch", "Did you mean 'epochs'?", "batch_candidates"]),
        ({"training__epochs": 0}, ["training.epochs", "0", "greater than or equal to 1"]),
        ({"grain": "month"}, ["grain", "'month'", "'hour', 'day' or 'week'"]),
        ({"tables__users": None}, ["users is missing"]),
        ({"sequences__0__events": "clicks"}, ["'clicks'", "tables has only"]),
        ({"features__0__side": "film"}, ["features.0.side", "'film'", "'user', 'item', 'context' or 'cross'"]),
        ({"features__0__vocabulary": ["a"]}, ["features.0", "vocabulary"]),
        ({"features__1__vocabulary": ["F", "M", "F"]}, ["features.1", "'F' is listed 2 times"]),
        ({"features__1__vocabulary": [["F", "M"]]}, ["features.1", "['F', 'M'] is no value of a column"]),
        ({"evaluation__task": "buy"}, ["'buy'", "'finish', 'skip'"]),
        ({"model__heads": 7}, ["model", "32 must be divisible by heads 7"]),
        ({"model__dropuot": 0.1}, ["model: dropuot", "Did you mean 'dropout'?", "head_dim"]),
        ({"model__preset": "huge"}, ["model", "ui-mixformer has no preset 'huge'", "tiny, base, small, medium"]),
        ({"model__name": "lstm"}, ["model.name", "'lstm'", "'hyformer'"]),
        ({"model__mixing": "dense"}, ["model: mixing", "'dense'", "'self_attention'"]),
        ({"model": {"name": "mixformer", "user_heads": 2}}, ["mixformer has user_heads = 0, not 2"]),
        ({"model": {"name": "hyformer", "tokens": 2}}, ["leave 1 for 3 groups", "raise tokens to at least 4"]),
        ({"model": {"name": "hyformer", "tokens": 7}}, ["width 64 must be divisible by the 7 tokens"]),
        ({"model": {"name": "hyformer", "queries": {"clicks": 1}}}, ["must name exactly the sequences", "ratings"]),
        ({"start": "1997-09-16"}, ["'1997-09-16' is not a Monday"]),
        ({"tables__users__columns": {"dt": "day"}}, ["tables.users", "dt cannot be mapped"]),
        ({"holdout__test": 0.95}, ["holdout", "below 1"]),
        ({"split": {"test": 0.1}}, ["split", "It is called holdout"]),
        ({"serving": {"weights": {"buy": 1.0}}}, ["serving.weights", "'buy'", "'finish', 'skip'"]),
        ({"trigger": {"wait_for": ["clicks"]}}, ["trigger.wait_for", "'clicks'", "'events'"]),
        ({"trigger": {"cron": "daily"}}, ["trigger.cron", "'daily'", "0 4 * * *"]),
        ({"workspace": "w\\1"}, ["workspace", "has \\ in its name", "rename"]),
        ({"workspace": "s3://lake/a%20b", "local": "l"}, ["workspace", "has %20 in its name"]),
        (
            {"tables__feedback": {"path": "f"}, "features__6__aggregate__of": "feedback"},
            ["counts the rows of 'feedback'", "only the logs ['events', 'impressions']"],
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_mistake_names_file_key_value_and_what_is_allowed(
    tmp_path: Path, changes: dict[str, Any], parts: list[str]
) -> None:
    path = changed(tmp_path, **changes)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    message = str(caught.value)
    for part in (str(path), *parts):
        assert part in message


def test_environment_variables_override_any_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CORANK_TRAINING__EPOCHS", "2")
    monkeypatch.setenv("CORANK_FEATURES__0__DIM", "9")
    config = load_config(EXAMPLES[0])
    assert config.training.epochs == 2
    assert config.features[0].dim == 9


@pytest.mark.parametrize("variable", ["CORANK_FEATURES__99__DIM", "CORANK_FEATURES__AGE__DIM", "CORANK_NAME__X"])
def test_an_environment_variable_that_leads_nowhere_is_a_mistake(
    monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "3")
    with pytest.raises(ConfigError, match=variable):
        load_config(EXAMPLES[0])


def test_a_mistyped_environment_variable_is_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CORANK_TRAINNG__EPOCHS", "2")
    with pytest.raises(ConfigError, match=r"CORANK_TRAINNG__EPOCHS.*Did you mean 'training'"):
        load_config(EXAMPLES[0])


def test_other_sections_do_not_change_a_digest() -> None:
    config = load_config(EXAMPLES[0])
    other = config.model_copy(update={"serving": config.serving.model_copy(update={"port": 1234})})
    assert config.digest_of("training", "model") == other.digest_of("training", "model")
    assert config.digest_of("serving") != other.digest_of("serving")
