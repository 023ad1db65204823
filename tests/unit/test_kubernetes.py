"""The Kubernetes manifests: valid by Kubernetes' own schemas, and right by what fastworker knows of itself."""

from __future__ import annotations

import copy
import ipaddress
import json
import operator
import shutil
import subprocess
from collections.abc import Iterator
from functools import reduce
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

import fastworker
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
    """By its own schemas, those of its release 1.31, and the operator's that know no other member (tests/kubernetes/make.py)."""
    folder = Path(__file__).resolve().parents[1] / "kubernetes"
    schemas = json.loads((folder / "1.31.json").read_text())
    schemas["kinds"]["monitoring.coreos.com/v1 ServiceMonitor"] = json.loads((folder / "monitor.json").read_text())
    with_any_names = set()
    for document in DOCUMENTS:
        kind = schemas["kinds"][f"{document['apiVersion']} {document['kind']}"]
        validator = jsonschema.Draft202012Validator({"$defs": schemas["$defs"]} | kind)
        validator.validate(document)
        with_any_names |= {place[-2:] for place, wrong in misspelled(document) if validator.is_valid(wrong)}
    assert with_any_names == {
        *(("metadata", "labels"), ("document", "data"), ("resources", "limits"), ("resources", "requests")),
        *(("selector", "matchLabels"), ("podSelector", "matchLabels"), ("spec", "selector")),
    }


def misspelled(document: dict[str, Any]) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """The document with one member more, in each of its objects in turn."""

    def places(node: Any, place: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
        if isinstance(node, dict):
            yield place
        for name, inner in (
            node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        ):
            yield from places(inner, (*place, name))

    for place in places(document, ("document",)):
        wrong = copy.deepcopy(document)
        reduce(operator.getitem, place[1:], wrong)["nmae"] = "misspelled"
        yield place, wrong


def test_every_file_is_a_resource() -> None:
    assert {path.name for path in BASE.iterdir()} == {*KUSTOMIZATION["resources"], "kustomization.yaml"}
    assert [doc["kind"] for doc in DOCUMENTS] == [
        "ConfigMap", "Job", "Deployment", "Service", "Deployment", "Service", "PodDisruptionBudget", "ServiceMonitor",
        "NetworkPolicy", "NetworkPolicy",
    ]  # fmt: skip


def test_kustomize_builds_them() -> None:
    """Where kubectl is installed: what it makes is what the other tests look at, with our label everywhere."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not installed")
    done = subprocess.run([kubectl, "kustomize", str(BASE)], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    made = list(yaml.safe_load_all(done.stdout))
    assert sorted((doc["kind"], doc["metadata"]["name"]) for doc in made) == sorted(
        (doc["kind"], doc["metadata"]["name"]) for doc in DOCUMENTS
    )
    for document in made:
        assert document["metadata"]["labels"]["app.kubernetes.io/part-of"] == "fastworker"
        if document["kind"] in {"Job", "Deployment"}:
            template = document["spec"]["template"]
            assert template["metadata"]["labels"]["app.kubernetes.io/part-of"] == "fastworker"
            for container in containers(template["spec"]):
                assert container["image"] == f"registry.example/fastworker:{fastworker.__version__}"


def containers(pod: dict[str, Any]) -> list[dict[str, Any]]:
    return [*pod.get("initContainers", ()), *pod["containers"]]


@pytest.mark.parametrize("name", list(PODS))
def test_pods_run_as_nobody_and_write_nothing(name: str) -> None:
    pod = PODS[name]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["automountServiceAccountToken"] is False
    assert pod["enableServiceLinks"] is False, "FASTWORKER_READER_PORT=tcp://... is no setting of ours"
    assert len(pod["containers"]) == 1
    for container in containers(pod):
        assert container["image"] == KUSTOMIZATION["images"][0]["name"]
        assert container["args"][0] in cli.commands
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert {"cpu", "memory"} <= container["resources"]["requests"].keys()
        assert "memory" in container["resources"]["limits"]


def test_the_job_makes_the_schema_and_then_the_roles() -> None:
    steps = [container["args"] for container in containers(PODS["fastworker-migrate"])]
    assert [step[:2] for step in steps] == [["migrate"], ["grants", "worker"], ["grants", "reader"]]
    assert [step[2:] for step in steps[1:]] == [
        ["--apply", "--password-env", f"{service}_PASSWORD"] for service in ("WORKER", "READER")
    ]


def test_the_network_is_open_for_what_is_asked_and_for_public_addresses_only() -> None:
    inside, outside = one("NetworkPolicy", "fastworker")["spec"], one("NetworkPolicy", "fastworker-outside")["spec"]
    assert KUSTOMIZATION["labels"][0]["includeTemplates"] is True, "the policies choose pods by it"
    for spec in (inside, outside):
        assert spec["podSelector"]["matchLabels"].items() <= KUSTOMIZATION["labels"][0]["pairs"].items()
    assert [port["port"] for port in inside["ingress"][0]["ports"]] == [WORKER_PORT, READER_PORT]
    assert [[port["port"] for port in rule["ports"]] for rule in inside["egress"]] == [[53, 53], [6379, 5432]]
    [rule] = outside["egress"]
    assert rule["ports"] == [{"port": 443}]
    closed = [ipaddress.ip_network(text) for to in rule["to"] for text in to["ipBlock"]["except"]]
    for address in ("10.0.0.1", "127.0.0.1", "169.254.169.254", "192.168.1.1", "100.64.0.1", "fd00::1"):
        assert any(ipaddress.ip_address(address) in network for network in closed), address
    [who] = outside["podSelector"]["matchExpressions"]
    deployments = {doc["metadata"]["name"] for doc in DOCUMENTS if doc["kind"] == "Deployment"}
    assert set(who["values"]) == deployments


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
        for container in containers(pod):
            assert {entry["name"] for entry in container.get("env", ())} <= known
            assert container["envFrom"][0] == {"configMapRef": {"name": "fastworker"}}
    owners = {
        name: {container["envFrom"][1]["secretRef"]["name"] for container in containers(pod)}
        for name, pod in PODS.items()
    }
    assert owners == {
        "fastworker-migrate": {"fastworker-owner"},
        "fastworker-reader": {"fastworker-reader"},
        "fastworker-worker": {"fastworker-worker"},
    }
