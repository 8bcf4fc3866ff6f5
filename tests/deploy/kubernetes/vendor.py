"""Writes the schemas beside it: the part of Kubernetes' and KubeRay's that our manifests need, without descriptions.

    pip install --target /tmp/schemas kubernetes-validate==1.37.0      # Kubernetes' JSON schemas, Apache-2.0
    git clone --depth 1 --branch v1.7.0 https://github.com/ray-project/kuberay /tmp/kuberay     # Apache-2.0
    python -m tests.deploy.kubernetes.vendor /tmp/schemas /tmp/kuberay
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import yaml

SCHEMAS = Path(__file__).with_name("schemas")
KINDS = ("apps.v1.Deployment", "apps.v1.StatefulSet", "autoscaling.v2.HorizontalPodAutoscaler",
         "core.v1.PersistentVolumeClaim", "core.v1.Service", "networking.v1.Ingress", "networking.v1.NetworkPolicy",
         "policy.v1.PodDisruptionBudget")
DEFINITIONS = "/api/_definitions.json#"
RELEASE, KUBERAY_RELEASE = "1.37.0", "1.7.0"


def kubernetes(folder: Path) -> dict[str, Any]:
    """The definitions of our kinds, and what they refer to. Unknown fields are refused ("strict")."""
    file = folder / "kubernetes_validate" / "kubernetes-json-schema" / f"v{RELEASE}-local-strict" / "_definitions.json"
    every, needed = json.loads(file.read_text())["$defs"], {}
    waiting = [f"io.k8s.api.{kind}" for kind in KINDS]
    while waiting:
        name = waiting.pop()
        if name not in needed:
            text = json.dumps(undescribed(every[name])).replace(DEFINITIONS, "#")
            needed[name] = json.loads(text)
            waiting += [other for other in every if f'"#/$defs/{other}"' in text]
    return {"source": f"kubernetes-validate {RELEASE} (Apache-2.0), strict", "$defs": dict(sorted(needed.items()))}


def kuberay(folder: Path) -> dict[str, Any]:
    """The schema of a RayService of ray.io/v1, its status left out."""
    file = folder / "ray-operator" / "config" / "crd" / "bases" / "ray.io_rayservices.yaml"
    versions = yaml.load(file.read_text(), Loader=yaml.CSafeLoader)["spec"]["versions"]
    schema = next(v["schema"]["openAPIV3Schema"] for v in versions if v["name"] == "v1")
    del schema["properties"]["status"]
    return {"source": f"ray-project/kuberay v{KUBERAY_RELEASE} (Apache-2.0), {file.name}", **undescribed(schema)}


def undescribed(schema: Any) -> Any:
    """Without descriptions, which are most of it. A field named "description" has an object there, and stays."""
    if isinstance(schema, dict):
        return {key: undescribed(value) for key, value in schema.items()
                if not (key == "description" and isinstance(value, str))}
    return [undescribed(value) for value in schema] if isinstance(schema, list) else schema


def main() -> None:
    """Read both sources and write the two files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("schemas", type=Path, help="folder that kubernetes-validate was installed into")
    parser.add_argument("kuberay", type=Path, help="checkout of KubeRay")
    given = parser.parse_args()
    for name, content in (("kubernetes.json", kubernetes(given.schemas)), ("rayservice.json", kuberay(given.kuberay))):
        (SCHEMAS / name).write_text(json.dumps(content, indent=None, separators=(",", ":")) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
