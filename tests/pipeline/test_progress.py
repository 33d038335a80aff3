"""What commands print: names and paths of users as they are written."""

from __future__ import annotations

import pytest

from pipeline.commands.summary import print_answer
from pipeline.progress import Progress

NAMES = ["[red]x[/red]", "[v2]", ":tv:", "a[/]b"]


def test_brackets_are_no_markup_and_colons_no_emoji(capsys: pytest.CaptureFixture[str]) -> None:
    answer = {
        "request_ts": 0,
        "model_version": "[m]",
        "tasks": ["click"],
        "ranking": NAMES,
        "scores": {"click": [0.4, 0.3, 0.2, 0.1]},
        "cold_start": {"user": True, "items": NAMES},
    }
    print_answer({"user_id": "[u]", "candidates": NAMES, "context": {}}, answer)
    progress = Progress()
    for name in NAMES:
        progress.note(f"table {name}")
        with progress.stage("validated") as stage:
            stage.say(f"partition of {name}")
    printed = capsys.readouterr()
    for name in (*NAMES, "[u]", "[m]"):
        assert name in printed.out
    for name in NAMES:
        assert printed.err.count(name) == 3


def test_a_stage_that_fails_has_no_check_mark(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        with Progress().stage("validated") as stage:
            stage.say("0 of 3 partitions pass")
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        fail()
    printed = capsys.readouterr().err
    assert "✗ validated      0 of 3 partitions pass" in printed
    assert "✓" not in printed
