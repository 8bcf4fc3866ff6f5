"""`KubernetesOptions`: everything that `deploy export-kubernetes` is asked, each with its help and default, once."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from runtimes.errors import InputError

LAYOUTS = ("single", "engines", "ray")
BUNDLES_IN = ("image", "image-volume", "claim")
SCALE_ON = ("cpu", "queue")
NAME = re.compile(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?")  # with what is appended still a DNS label (RFC 1123)
HOST = re.compile(r"(?=.{1,253}$)[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)+")
IMAGE = re.compile(r"[\w.:/@-]+")
QUANTITY = re.compile(r"[1-9][0-9]*([KMGTPE]i?)?|[0-9]+\.[0-9]+([KMGTPE]i?)?")
REPLICAS = re.compile(r"([1-9][0-9]{0,3}):([1-9][0-9]{0,3})")


def option(default: Any, help: str, /, **more: Any) -> Any:
    """A field that is an option; `more` are attributes of `deploy.cli.derived_options.Option`."""
    return field(default=default, metadata={"help": help, **more})


@dataclass(frozen=True)
class KubernetesOptions:
    """How the server is laid out on a cluster.

    Raises:
        InputError: a value that Kubernetes would refuse, or options that do not go together.
    """

    layout: str = option("single", "one server, a server whose further engines scale, or Ray Serve under KubeRay",
                         choices=LAYOUTS)
    name: str = option("ldm-deploy", "of every object, at most 40 letters, digits and -")
    namespace: str = option("", "that the objects are made in", default="the one that kubectl uses")
    image: str = option("", "image of the containers", default="NAME:DIGEST, made by the Dockerfile that is written")
    bundles_in: str = option("image", "where the pods find the bundles: in the image itself, in a second image that is "
                             "mounted (Kubernetes 1.35), or on a volume claim that you fill", choices=BUNDLES_IN)
    bundles_from: str = option("", "second image, or claim", default="NAME-bundles")
    gpu: int = option(0, "GPUs of each pod that generates; 0 generates on the CPU", least=0, most=16)
    cpu: float = option(4.0, "CPU cores of each pod that generates", above=0, most=512)
    memory: str = option("8Gi", "memory of each pod that generates")
    replicas: str = option("1:4", "fewest and most pods that generate, with --layout engines or ray")
    scale_on: str = option("cpu", "what engines are scaled by: their CPU use, or the queue's length, which needs an "
                           "adapter for external metrics", choices=SCALE_ON)
    host: str = option("", "name under which an Ingress shows the server", default="no Ingress")
    storage: str = option("20Gi", "size of the volume of jobs and images")
    storage_class: str = option("", "storage class of the volume", default="the cluster's own")
    secret: str = option("", "Secret that holds the API keys and the engine key", default="NAME-keys")
    drain_seconds: int = option(120, "how long requests under way may take when a pod ends", least=1, most=3600)

    def __post_init__(self) -> None:
        """Check each value as Kubernetes would, and what one says of another."""
        for name, declared in self.__dataclass_fields__.items():
            _check_range(name, getattr(self, name), declared.metadata)
        for name, pattern, example in (
                ("name", NAME, "images"), ("namespace", NAME, "images"), ("image", IMAGE, "registry/images:1"),
                ("host", HOST, "images.example.org"), ("storage", QUANTITY, "20Gi"), ("memory", QUANTITY, "8Gi"),
                ("storage_class", NAME, "fast"), ("secret", NAME, "images-keys"), ("bundles_from", IMAGE, "bundles:1"),
                ("replicas", REPLICAS, "1:4")):
            value = getattr(self, name)
            if value != self.__dataclass_fields__[name].default and not pattern.fullmatch(value):
                raise InputError(f"{value!r} cannot be used", where=flag(name), fix=f"for example {example}")
        if self.least > self.most:
            raise InputError(f"at least {self.least} and at most {self.most}", where="--replicas", fix="as 1:4")
        if self.layout == "single" and self.replicas != "1:4":
            raise InputError("one server has no replicas", where="--replicas", fix="--layout engines or ray")
        if self.layout != "engines" and self.scale_on != "cpu":
            raise InputError("only --layout engines scales by it", where="--scale-on",
                             fix="leave it out; Ray scales by requests under way")
        if self.bundles_from and self.bundles_in == "image":
            raise InputError("the bundles are in the containers' image", where="--bundles-from",
                             fix="add --bundles-in image-volume or claim")

    @property
    def least(self) -> int:
        """Fewest pods that generate."""
        return int(self.replicas.split(":")[0])

    @property
    def most(self) -> int:
        """Most pods that generate."""
        return int(self.replicas.split(":")[1])

    @property
    def device(self) -> str:
        """As `serve --device` takes it."""
        return ",".join(f"cuda:{number}" for number in range(self.gpu)) or "cpu"


def flag(name: str) -> str:
    """A field as the command line writes it."""
    return f"--{name.replace('_', '-')}"


def _check_range(name: str, value: Any, said: Any) -> None:
    if "choices" in said and value not in said["choices"]:
        raise InputError(f"{value!r} is none of its values", where=flag(name),
                         fix=f"one of {', '.join(said['choices'])}")
    if ("least" in said and value < said["least"]) or ("above" in said and value <= said["above"]) or (
            "most" in said and value > said["most"]):
        raise InputError(f"{value} is out of range", where=flag(name), fix="see `deploy export-kubernetes --help`")
