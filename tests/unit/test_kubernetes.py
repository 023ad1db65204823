"""The Kubernetes manifests: valid by Kubernetes' own schemas, and right by what fastworker knows of itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from fastworker.cli import cli
from fastworker.config import READER_PORT, VARIABLES, WORKER_PORT

BASE = Path(__file__).resolve().parents[2] / "deploy" / "kubernetes" / "base"
KUSTOMIZATION = yaml.safe_load((BASE / "kustomization.yaml").read_text())
DOCUMENTS: list[dict[str, Any]] = [
    document for name in KUSTOMIZATION["resources"] for document in yaml.safe_load_all((BASE / name).read_text())
]
PODS = {
    one["metadata"]["name"]: one["spec"]["template"]["spec"]
    for one in DOCUMENTS
    if one["kind"] in {"Job", "Deployment"}
}


def one(kind: str, name: str) -> dict[str, Any]:
    [found] = [doc for doc in DOCUMENTS if doc["kind"] == kind and doc["metadata"]["name"] == name]
    return found


def test_kubernetes_accepts_them() -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed (extra dev)")
    for document in DOCUMENTS:
        if "monitoring.coreos.com" not in document["apiVersion"]:  # a custom resource
            validate.validate(document, "1.31", strict=True)


def test_every_file_is_a_resource() -> None:
    assert {path.name for path in BASE.iterdir()} == {*KUSTOMIZATION["resources"], "kustomization.yaml"}
    assert [doc["kind"] for doc in DOCUMENTS] == [
        "ConfigMap", "Job", "Deployment", "Service", "Deployment", "Service", "PodDisruptionBudget", "ServiceMonitor",
    ]  # fmt: skip


@pytest.mark.parametrize("name", list(PODS))
def test_pods_run_as_nobody_and_write_nothing(name: str) -> None:
    pod = PODS[name]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["automountServiceAccountToken"] is False
    assert pod["enableServiceLinks"] is False, "FASTWORKER_READER_PORT=tcp://... is no setting of ours"
    [container] = pod["containers"]
    assert container["image"] == KUSTOMIZATION["images"][0]["name"]
    assert container["args"][0] in cli.commands
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert {"cpu", "memory"} <= container["resources"]["requests"].keys()
    assert "memory" in container["resources"]["limits"]


@pytest.mark.parametrize(("name", "port"), [("fastworker-reader", READER_PORT), ("fastworker-worker", WORKER_PORT)])
def test_probes_and_scrapes_ask_the_port_that_answers(name: str, port: int) -> None:
    [container] = PODS[name]["containers"]
    assert container["ports"] == [{"name": "http", "containerPort": port}]
    paths = {probe: container[probe]["httpGet"] for probe in ("startupProbe", "livenessProbe", "readinessProbe")}
    assert paths["startupProbe"] == paths["livenessProbe"] == {"path": "/livez", "port": "http"}
    assert paths["readinessProbe"] == {"path": "/readyz", "port": "http"}
    assert PODS[name]["terminationGracePeriodSeconds"] >= 10, "a worker drains for 8 s"
    service, labels = one("Service", name), one("Deployment", name)["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= labels.items()
    assert service["spec"]["ports"] == [{"name": "http", "port": port, "targetPort": "http"}]
    monitor = one("ServiceMonitor", "fastworker")["spec"]
    assert monitor["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert monitor["endpoints"][0]["port"] == "http"


def test_there_is_one_reader_and_the_old_one_goes_first() -> None:
    spec = one("Deployment", "fastworker-reader")["spec"]
    assert (spec["replicas"], spec["strategy"]) == (1, {"type": "Recreate"})
    budget = one("PodDisruptionBudget", "fastworker-worker")["spec"]
    labels = one("Deployment", "fastworker-worker")["spec"]["template"]["metadata"]["labels"]
    assert budget["selector"]["matchLabels"].items() <= labels.items()


def test_settings_are_settings() -> None:
    known = {variable.name for variable in VARIABLES}
    assert one("ConfigMap", "fastworker")["data"].keys() <= known
    for pod in PODS.values():
        [container] = pod["containers"]
        assert {entry["name"] for entry in container.get("env", ())} <= known
        assert container["envFrom"][0] == {"configMapRef": {"name": "fastworker"}}
    owners = {name: pod["containers"][0]["envFrom"][1]["secretRef"]["name"] for name, pod in PODS.items()}
    assert owners == {
        "fastworker-migrate": "fastworker-owner",
        "fastworker-reader": "fastworker",
        "fastworker-worker": "fastworker",
    }
