"""What the report and the status say, out of records as stages write them; no model is trained."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from features.errors import CorankError
from pipeline.cost import Cost, keep
from pipeline.evaluation.criterion import Criterion
from pipeline.importers.synthetic import import_synthetic
from pipeline.progress import Progress
from pipeline.report import report_of
from pipeline.stages.challenger import CHALLENGER, ChallengerRecord
from pipeline.stages.evaluation import EVALUATION, EvaluationRecord
from pipeline.stages.progressive_validation import PROGRESSIVE_VALIDATION, ProgressiveRecord
from pipeline.stages.validated import VALIDATED, ValidatedRecord
from pipeline.status import blocked, reached, runs_now
from pipeline.watch import readiness
from pipeline.workspace import Workspace, exclusive
from tests.browser import opened
from tests.pipeline.workspaces import START, load

DAYS = ["2026-01-05", "2026-01-06"]
STRANGE = "title is <script>alert('no')</script> & more"
BINS = [{"impressions": 50, "predicted": 0.1, "observed": 0.08}, {"impressions": 50, "predicted": 0.4, "observed": 0.5}]


def metrics(auc: float | None) -> dict[str, Any]:
    shares = {"user_share": 1.0, "query_share": 1.0}
    return {"auc": auc, "uauc": None, "gauc": auc, "query_auc": None, "logloss": 0.4, "impressions": 100, **shares}


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """Two days, of which the first did not pass; a champion on the first, and a refused challenger on both."""
    import_synthetic(tmp_path / "data", days=2, users=20, items=20, seed=5, start=START, buckets=2, say=lambda _: None)
    workspace = Workspace(load(tmp_path, tmp_path / "data"), Progress())
    records, registry = workspace.records, workspace.registry
    (tmp_path / "artifact").mkdir()
    entry = {**metrics(0.71), "positives": 0.2, "baseline": metrics(0.68), "champion": metrics(None)}
    entry |= {"auc_gain_over_baseline": {"difference": 0.03, "low": 0.01, "high": 0.05}}
    entry |= {"auc_gain_over_champion": None, "calibration": BINS}
    for number, day in enumerate(DAYS, start=1):
        key, content = f"verdict-{number}", f"content{number}"
        verdict = EvaluationRecord(
            inputs=key,
            model=content,
            tasks={"click": entry},
            impressions=100,
            passed=number == 1,
            reasons=[] if number == 1 else ["AUC loses <more> than it may"],
            fingerprints={one: {"impressions": "id@1"} for one in DAYS[:number]},
            versions={"impressions": 7},
        )
        records.write(EVALUATION, key, verdict)
        history = [{"epoch": epoch, "loss": 1 / epoch, "click_auc": 0.6, "candidates": 90} for epoch in (1, 2)]
        trained = ChallengerRecord(inputs=key, version=content, history=history, partitions={DAYS[0]: "samples"})
        records.write(CHALLENGER, key, replace(trained, seed=11, code="0.1+abc", artifact="there"))
        tags = {"content": content, "judged": content, "evaluation": key, "partition": day, "trained": day}
        run = registry.log_run("run", content, {}, {}, [], str(tmp_path / "artifact"))
        registry.register(str(tmp_path / "artifact"), run, tags)
    registry.promote(1)
    finding = {"message": STRANGE, "rule": "r", "table": "items", "partition": DAYS[0], "count": 1, "rows": 2}
    records.write(VALIDATED, DAYS[0], ValidatedRecord(rows={"impressions": 1234}, quarantined=4, findings=[finding]))
    scored = {"1": {"click": metrics(0.66)}}
    records.write(PROGRESSIVE_VALIDATION, DAYS[1], ProgressiveRecord(champion=1, frozen=1, versions_scored=scored))
    keep(records, DAYS[1], "samples", Cost(2, 4321, 1.5, 2.25))
    return workspace


def test_a_report_tells_what_the_records_hold_and_needs_no_network(workspace: Workspace) -> None:
    path = report_of(workspace, 2)
    page = path.read_text()
    text = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    said = " ".join(re.sub(r"<[^>]+>", " ", text).split())
    for part in (
        "gate failed",
        "AUC loses &lt;more&gt; than it may",
        "challenger 0.7100 – 0.7100 – 0.4000",
        "baseline 0.6800",
        "AUC − baseline: +0.0300, interval over resampled users +0.0100 … +0.0500",
        "2 – 2026-01-06 0.7100 +0.0300 not promoted",
        "1 champion – 2026-01-05 0.7100 +0.0300 promoted",
        "2026-01-05 not passed 0 1,234 4",
        "samples 2 4,321 1.5 2.2",
        "0.1+abc",
        "impressions 7",
        "2026-01-05 impressions id@1",
    ):
        assert part in said, part
    assert STRANGE not in page
    assert "title is &lt;script&gt;" in text
    assert not re.search(r"""<(?:script|link|img|iframe)[^>]+(?:src|href)=""", text)
    assert "default-src 'none'" in page
    assert set(re.findall(r'id="figure-(\w+)"', page)) == {"partitions", "learning", "calibration", "life"}


def test_a_report_lies_with_the_models_run_in_mlflow_and_is_replaced_there(workspace: Workspace) -> None:
    registry = workspace.registry
    path = report_of(workspace, None)
    assert path.name == "content1.html"
    registry.promote(2)
    report_of(workspace, 1)
    run = registry.version(1).run
    assert [one.path for one in registry.client.list_artifacts(run, "report")] == ["report/content1.html"]
    kept = Path(registry.client.download_artifacts(run, "report/content1.html")).read_text()
    assert kept == path.read_text()
    assert "<td>previous</td>" in kept


def test_a_version_without_a_verdict_has_no_report(workspace: Workspace) -> None:
    workspace.records.discard(EVALUATION, "verdict-2")
    with pytest.raises(CorankError, match="version 2: there is no record of its verdict"):
        report_of(workspace, 2)
    with pytest.raises(CorankError, match="has no version 9; there are: 2, 1"):
        report_of(workspace, 9)


def test_a_report_shows_every_criterion_of_the_verdict(workspace: Workspace) -> None:
    verdict = workspace.records.require(EVALUATION, "verdict-2")
    criteria = [
        Criterion("click AUC, gain over version 1", -0.04, (-0.06, -0.02), -0.01, "≥ -0.01", False),
        Criterion("drift of <b>", 0.1, None, 0.5, "≤ 0.5", True, "ten bins"),
        Criterion("gain over boosting", None, None, None, "", None, "too few to tell"),
    ]
    workspace.records.write(EVALUATION, "verdict-2", replace(verdict, criteria=criteria))
    text = re.sub(r"<[^>]+>", " ", report_of(workspace, 2).read_text())
    said = " ".join(text.split())
    for row in (
        "click AUC, gain over version 1 -0.0400 -0.0600 … -0.0200 ≥ -0.01 failed",
        "drift of &lt;b&gt; 0.1000 ≤ 0.5 passed ten bins",
        "gain over boosting – told too few to tell",
    ):
        assert row in said, row


def test_a_report_of_records_of_an_earlier_version_says_what_is_missing(workspace: Workspace) -> None:
    verdict = workspace.records.require(EVALUATION, "verdict-1")
    entry = {name: value for name, value in verdict.tasks["click"].items() if name != "calibration"}
    workspace.records.write(EVALUATION, "verdict-1", replace(verdict, tasks={"click": entry}))
    page = report_of(workspace, 1).read_text()
    assert "The record of this verdict holds none." in page
    assert "It begins with the first retraining." in page
    assert "Not measured." in page


def test_the_status_says_how_far_partitions_are_and_what_is_blocked(workspace: Workspace) -> None:
    waiting = readiness(workspace)
    assert {what: len(own) for what, own in reached(workspace, waiting).items()} == {
        "ready": 2,
        "validated": 0,
        "built": 0,
        "trained": 1,
        "live": 0,
    }
    served = {"refused": {"artifact": "there", "why": "it lies"}}
    lines = blocked(workspace, waiting, served)
    assert lines == [
        f"partition {DAYS[0]} did not pass its validation: {STRANGE}",
        "version 2 was refused: AUC loses <more> than it may",
        "the service refuses there: it lies",
    ]
    workspace.registry.drop(2)
    waiting = readiness(workspace)
    assert f"partition {DAYS[1]} waits for impressions of a later partition" in blocked(workspace, waiting, None)
    assert reached(workspace, waiting)["ready"] == DAYS[:1]


def test_the_status_names_the_command_that_works_and_one_that_was_killed(workspace: Workspace) -> None:
    config = workspace.config
    assert runs_now(config) == []
    program = (
        "import sys, time\nfrom pathlib import Path\nfrom pipeline.config import load_config\n"
        "from pipeline.workspace import exclusive\nwith exclusive(load_config(Path(sys.argv[-1]))):\n"
        "    print('has it', flush=True)\n    time.sleep(60)\n"
    )
    path = str(config.local_path().parent / "config.yaml")
    command = [sys.executable, "-c", program, "retrain", "--config", path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "has it\n"
        (line,) = runs_now(config)
        assert line.startswith(f"process {process.pid} since ")
        assert line.endswith(f": corank retrain --config {path}")
        with pytest.raises(CorankError, match="another corank run"), exclusive(config):
            pass
        process.kill()
    assert runs_now(config) == []
    assert f"the last command (process {process.pid}) was killed" in blocked(workspace, [], None)[-1]


def test_a_script_that_fails_is_seen(tmp_path: Path, chromium: str) -> None:
    page = tmp_path / "page.html"
    page.write_text("<script>document.title = 'ran'; nothing.there()</script>")
    content, errors = opened(chromium, page)
    assert "<title>ran</title>" in content
    assert any("Uncaught ReferenceError" in one for one in errors)
    page.write_text("<script>document.title = 'ran'</script>")
    assert opened(chromium, page)[1] == []
