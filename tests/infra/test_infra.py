"""Everything of ``infra/`` that can be checked without building an image or having a cluster."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import numpy as np
import promql_parser
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from ray.serve.schema import ServeDeploySchema

from pipeline.config import load_config
from serving.metrics import Metrics
from tests.serving.test_auth import ANSWER

INFRA = Path("infra")
MANIFESTS = sorted(INFRA.glob("kuberay/*.yaml"))
KUBERNETES = "1.37"


def documents(path: Path) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def expressions() -> dict[str, str]:
    """Every PromQL expression of rules and dashboard, by where it stands."""
    (rules,) = documents(INFRA / "monitoring/rules.yaml")
    found = {rule["alert"]: rule["expr"] for group in rules["groups"] for rule in group["rules"]}
    for panel in json.loads((INFRA / "monitoring/dashboard.json").read_text())["panels"]:
        found |= {f"{panel['title']} {target['refId']}": target["expr"] for target in panel["targets"]}
    return found


def exported() -> dict[str, set[str]]:
    """Names of the samples that the endpoint exports, and their labels."""
    metrics = Metrics("test")
    metrics.answered(ANSWER | {"cold_start": {"user": True, "items": ["a"]}})
    metrics.state("1", False, 1)
    metrics.logged("impressions", "written", 1)
    metrics.shadowed("click", np.zeros(1), np.ones(1))
    metrics.shadow_failed()
    metrics.begun()
    metrics.ended("/v1/rank", 200, 0.1)
    families = text_string_to_metric_families(metrics.text().decode())
    samples = [sample for family in families for sample in family.samples]
    return {
        name: {key for one in samples if one.name == name for key in one.labels} for name in {s.name for s in samples}
    }


def test_the_dockerfile_follows_the_rules_of_hadolint() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, INFRA / "Dockerfile"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_what_the_dockerfile_copies_is_there() -> None:
    copied = re.findall(r"^COPY (?!--from)(.+)$", (INFRA / "Dockerfile").read_text(), re.MULTILINE)
    sources = [source for line in copied for source in line.split()[:-1]]
    assert {"features", "models", "serving", "pipeline", "pyproject.toml", "constraints.txt"} <= set(sources)
    assert all(Path(source).exists() for source in sources)


def test_the_stack_of_compose_fits_together() -> None:
    (stack,) = documents(INFRA / "docker-compose.yaml")
    services, volumes = stack["services"], stack["volumes"]
    assert {"serve", "watch", "redis", "postgres", "mlflow", "minio", "prometheus", "grafana"} == set(services)
    for name, service in services.items():
        assert set(service.get("depends_on", ())) <= set(services), name
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            if source.startswith("./"):  # the folder tokens is the operator's own
                assert (INFRA / source).exists() or source == "./tokens", volume
            else:
                assert source in volumes, volume
        for port in service.get("ports", ()):
            assert port.startswith("127.0.0.1:"), port  # TLS is left to a proxy
        for key, value in service.get("environment", {}).items():
            if key.endswith(("PASSWORD", "SECRET_ACCESS_KEY")):
                assert str(value).startswith("${"), key  # no secret is written down
    commands = [services[name]["command"][0] for name in ("serve", "watch")]
    for command in commands:
        done = subprocess.run(
            [sys.executable, "-m", "pipeline.cli", command, "--help"], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr


def test_the_config_of_the_stack_is_one() -> None:
    config = load_config(INFRA / "config.yaml")
    assert config.feast.redis == "redis:6379"
    assert config.serving.tokens == "/corank/tokens/tokens"
    assert config.local == "/corank/local"


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_manifests_follow_the_schemas_of_kubernetes(path: Path) -> None:
    for document in documents(path):
        if document["kind"] != "RayService":
            kubernetes_validate.validate(document, KUBERNETES, strict=True)
            continue
        cluster = document["spec"]["rayClusterConfig"]
        groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
        for group in groups:
            pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "ray"}, **group["template"]}
            kubernetes_validate.validate(pod, KUBERNETES, strict=True)
            assert all(isinstance(value, str) for value in group["rayStartParams"].values())


def test_the_rayservice_deploys_our_application_with_the_ray_that_is_pinned() -> None:
    (document,) = documents(INFRA / "kuberay/rayservice.yaml")
    deployed = ServeDeploySchema.model_validate(yaml.safe_load(document["spec"]["serveConfigV2"]))
    (application,) = deployed.applications
    module, _, name = application.import_path.partition(":")
    assert callable(getattr(__import__(module, fromlist=[name]), name))
    version = document["spec"]["rayClusterConfig"]["rayVersion"]
    assert f"ray=={version}" in Path("constraints.txt").read_text().splitlines()


def test_every_resource_of_the_kustomization_is_there() -> None:
    (kustomization,) = documents(INFRA / "kustomization.yaml")
    assert sorted(INFRA / one for one in kustomization["resources"]) == MANIFESTS
    assert all((INFRA / file).exists() for one in kustomization["configMapGenerator"] for file in one["files"])


def test_containers_need_no_privileges_and_read_secrets_from_secrets() -> None:
    for path in MANIFESTS:
        text = path.read_text()
        assert "privileged: true" not in text
        assert not re.search(r"(?i)(password|secret_access_key)\s*:\s*\S", text)
        assert text.count("image: corank") == text.count("allowPrivilegeEscalation: false")


def test_rules_and_dashboard_ask_for_metrics_and_labels_that_the_endpoint_exports() -> None:
    there = exported()
    for where, expression in expressions().items():
        promql_parser.parse(expression)
        named = re.findall(r"\b(corank_\w+)(?:\{([^}]*)\})?", expression)
        assert named or "up{" in expression, where
        for name, matchers in named:
            assert name in there, f"{where}: {name}"
            labels = set(re.findall(r"(\w+)\s*[=!]~?", matchers)) | {
                part.strip() for group in re.findall(r"by \(([^)]*)\)", expression) for part in group.split(",")
            }
            assert labels - {""} <= there[name] | {"le"}, f"{where}: {labels - there[name]}"


def test_every_alert_has_its_page() -> None:
    page = Path("docs/cluster.md").read_text()
    anchors = {heading.lower() for heading in re.findall(r"^#+ (\w+)$", page, re.MULTILINE)}
    (rules,) = documents(INFRA / "monitoring/rules.yaml")
    for rule in (rule for group in rules["groups"] for rule in group["rules"]):
        document, _, anchor = rule["annotations"]["runbook"].partition("#")
        assert document == "docs/cluster.md"
        assert anchor == rule["alert"].lower()
        assert anchor in anchors
