"""``corank doctor``: what is wrong is found, and each finding says what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config import Config
from pipeline.doctor import CHECKS, Finding, examine
from pipeline.importers.synthetic import import_synthetic
from tests.pipeline.workspaces import START, load
from tests.servers import free_port


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("doctor") / "data"
    import_synthetic(folder, days=1, users=10, items=10, seed=1, start=START, buckets=2, say=lambda _: None)
    return folder


def found(config: Config, check: str) -> list[Finding]:
    return [finding for finding in examine(config) if finding.check == check and finding.level != "ok"]


def test_a_machine_that_is_fit_has_no_failure(data: Path, tmp_path: Path) -> None:
    findings = list(examine(load(tmp_path, data)))
    assert {finding.check for finding in findings} >= {
        "versions",
        "machine",
        "disk",
        "clock",
        "tables",
        "ray",
        "endpoint",
    }
    assert [finding for finding in findings if finding.level == "failure"] == []
    assert not (tmp_path / "work").exists()  # nothing is changed


def test_what_is_wrong_is_found_with_a_remedy(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    config = load(
        tmp_path,
        data,
        feast={"online": "redis", "redis": f"127.0.0.1:{port}"},
        mlflow_uri=f"http://127.0.0.1:{port}",
        training={"use_gpu": True},
        serving={"port": port, "tokens": str(tmp_path / "tokens")},
    )
    servers = found(config, "servers")
    assert [finding.level for finding in servers] == ["failure", "failure"]
    assert all(str(port) in finding.found for finding in servers)
    assert "serving.tokens" in found(config, "endpoint")[0].found
    assert "no GPU" in found(config, "machine")[0].found
    gone = load(tmp_path, tmp_path / "nowhere")
    assert len(found(gone, "tables")) == len(gone.tables)
    every = [*servers, *found(config, "endpoint"), *found(config, "machine"), *found(gone, "tables")]
    assert all(finding.remedy for finding in every)
    monkeypatch.setattr(
        "importlib.metadata.requires", lambda _: ["torch>=99", "nothing-of-this-name", "x; extra == 'y'"]
    )
    (versions,) = found(config, "versions")
    assert versions.level == "failure"
    assert "torch" in versions.found
    assert "nothing-of-this-name is missing" in versions.found


def test_a_check_that_breaks_stops_no_other(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: Config) -> list[Finding]:
        raise OSError("out of luck")

    monkeypatch.setitem(CHECKS, "disk", broken)  # type: ignore[arg-type]
    config = load(tmp_path, data)
    (finding,) = found(config, "disk")
    assert (finding.level, "out of luck" in finding.found) == ("failure", True)
    assert any(one.check == "endpoint" for one in examine(config))
