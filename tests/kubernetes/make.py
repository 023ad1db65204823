"""Keeps of Kubernetes' own schemas what our manifests need: `python -m tests.kubernetes.make FOLDER > tests/kubernetes/1.31.json`.

FOLDER is `kubernetes-json-schema/v1.31.0-local-strict` of the package kubernetes-validate. The package is not installed
for the tests: its schemas of all releases are 17,000 files, more than half of what the whole set-up would write.

`python -m tests.kubernetes.make monitor > tests/kubernetes/monitor.json`: the Prometheus operator's, where the package
cloudcoil-models-prometheus-operator (0.80.1) is installed. Its models let unknown members through; what is made here does not.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path
from typing import Any

KINDS = (
    *("v1 ConfigMap", "v1 Service", "apps/v1 Deployment", "batch/v1 Job"),
    *("networking.k8s.io/v1 NetworkPolicy", "policy/v1 PodDisruptionBudget"),
)
_SHARED = "/api/_definitions.json"


def file_of(kind: str) -> str:
    """`apps/v1 Deployment`: deployment-apps-v1.json"""
    api, name = kind.split()
    group, _, version = api.rpartition("/")
    return "-".join([name.lower(), *([group.split(".")[0]] if group else []), version]) + ".json"


def bare(node: Any, *, has_names: bool = False) -> Any:
    """Without words; references point into the same file. `has_names`: the members are names, not words of a schema."""
    match node:
        case dict():
            return {
                name: bare(value, has_names=name in {"properties", "$defs"} and not has_names)
                for name, value in node.items()
                if has_names or not re.match(r"description|x-kubernetes-|\$schema|\$id", name)
            }
        case list():
            return [bare(one) for one in node]
        case str():
            return node.removeprefix(_SHARED)
    return node


def references(node: Any) -> set[str]:
    return set(re.findall(r'"#/\$defs/([^"]+)"', json.dumps(node)))


def monitor() -> None:
    """Of pydantic's words: a member may be left out, which is not to say that it may be null; there are no others."""

    def strict(node: Any) -> Any:
        if isinstance(node, list):
            return [strict(one) for one in node]
        if not isinstance(node, dict):
            return node
        made = {name: strict(value) for name, value in node.items() if not (name == "default" and value is None)}
        if "anyOf" in made:
            made["anyOf"] = [one for one in made["anyOf"] if one != {"type": "null"}]
        if isinstance(made.get("title"), str):
            del made["title"]
        return made | ({"additionalProperties": False} if isinstance(made.get("properties"), dict) else {})

    model = importlib.import_module("cloudcoil.models.prometheus_operator.v1").ServiceMonitor
    print(json.dumps(bare(strict(model.model_json_schema())), separators=(",", ":"), sort_keys=True))  # noqa: T201


def main(folder: Path) -> None:
    definitions = json.loads((folder / "_definitions.json").read_text())["$defs"]
    kinds = {kind: bare(json.loads((folder / file_of(kind)).read_text())) for kind in KINDS}
    kept: dict[str, Any] = {}
    wanted = references(kinds)
    while wanted:
        name = wanted.pop()
        kept[name] = bare(definitions[name])
        wanted |= references(kept[name]) - kept.keys()
    print(json.dumps({"kinds": kinds, "$defs": dict(sorted(kept.items()))}, separators=(",", ":")))  # noqa: T201


if __name__ == "__main__":
    monitor() if sys.argv[1] == "monitor" else main(Path(sys.argv[1]))
