"""Kubernetes objects against the vendored schemas: as an API server would refuse them, unknown fields included."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import jsonschema  # type: ignore[import-untyped]

from tests.deploy.kubernetes.vendor import SCHEMAS

GROUPS = {"v1": "core.v1", "apps/v1": "apps.v1", "autoscaling/v2": "autoscaling.v2", "policy/v1": "policy.v1",
          "networking.k8s.io/v1": "networking.v1"}


def read(name: str) -> Any:
    return json.loads((SCHEMAS / name).read_text(encoding="utf-8"))


KUBERNETES, RAY_SERVICE = read("kubernetes.json"), read("rayservice.json")


def faults(document: dict[str, Any]) -> list[str]:
    """What an API server would refuse, each with its place."""
    return [f"{'.'.join(map(str, error.absolute_path))}: {error.message:.200}"
            for error in validator(document["apiVersion"], document["kind"]).iter_errors(document)]


@cache
def validator(version: str, kind: str) -> jsonschema.Draft202012Validator:
    if (version, kind) == ("ray.io/v1", "RayService"):
        return jsonschema.Draft202012Validator(strict(RAY_SERVICE))
    name = f"io.k8s.api.{GROUPS[version]}.{kind}"
    return jsonschema.Draft202012Validator({"$ref": f"#/$defs/{name}", "$defs": KUBERNETES["$defs"]})


def strict(schema: Any) -> Any:
    """A custom resource's schema that refuses fields it does not name; an API server would drop them in silence."""
    if isinstance(schema, list):
        return [strict(inner) for inner in schema]
    if not isinstance(schema, dict):
        return schema
    inner = {key: strict(value) for key, value in schema.items()}
    if isinstance(inner.get("properties"), dict) and inner.get("type") == "object" and not (
            inner.get("x-kubernetes-preserve-unknown-fields")) and "additionalProperties" not in inner:
        inner["additionalProperties"] = False
    return inner
