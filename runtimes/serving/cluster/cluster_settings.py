"""`ClusterSettings`: how the parts of a server are laid out on a Ray cluster; sent to every one of them as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from runtimes.errors import InputError
from runtimes.serving.engine.catalog import Catalog, ServedModel
from runtimes.serving.options import ServerOptions

APPLICATION, NAMESPACE, STATE_ACTOR, STATE_RESOURCE = "ldm-deploy", "ldm-deploy", "ldm-deploy-state", "ldm-state"
Bundles = Mapping[str, Mapping[str, str]]


@dataclass(frozen=True)
class ClusterSettings:
    """What every part of the server on the cluster is made from.

    Attributes:
        server: options of `serve`; `state` is a folder of the node that has the resource "ldm-state".
        fronts: replicas that take HTTP requests.
        engine_cpus, engine_gpus: that one engine replica takes of its node.
        front_cpus: the same of a front.
        drain_seconds: how long requests under way may take when a replica is stopped.
        downscale_seconds: how long an engine must have been idle before it is stopped.

    Raises:
        InputError: a value out of its range.
    """

    server: ServerOptions
    fronts: int = 1
    engine_cpus: float = 1.0
    engine_gpus: float = 0.0
    front_cpus: float = 0.1
    drain_seconds: float = 120.0
    downscale_seconds: float = 300.0

    def __post_init__(self) -> None:
        """Check the numbers."""
        for name, least in (("fronts", 1), ("engine_cpus", 0), ("engine_gpus", 0), ("front_cpus", 0),
                            ("drain_seconds", 0), ("downscale_seconds", 0)):
            if not getattr(self, name) >= least:
                raise InputError(f"{name} is at least {least}", where="args", fix="change it in the configuration")
        if not 1 <= self.least <= self.most:
            raise InputError(f"{self.server.replicas!r} cannot be used", where="--replicas", fix="for example 1:4")

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ClusterSettings:
        """What `to_json` made, or a configuration file has.

        Raises:
            InputError: an unknown key, or a value that cannot be used.
        """
        known, options = {f.name for f in fields(cls)}, {f.name for f in fields(ServerOptions)}
        server = values.get("server", {})
        if unknown := sorted({*values} - known) + sorted({*server} - options):
            raise InputError(f"unknown: {', '.join(unknown)}", where="args",
                             fix=f"one of {', '.join(sorted(known))}; below server, an option of `serve`")
        server = {name: tuple(value) if isinstance(value, list) else value for name, value in server.items()}
        return cls(**{**values, "server": ServerOptions(**server)})

    def to_json(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)

    @property
    def least(self) -> int:
        """Fewest engine replicas."""
        return self._replicas[0]

    @property
    def most(self) -> int:
        """Most engine replicas."""
        return self._replicas[1]

    @property
    def _replicas(self) -> tuple[int, int]:
        least, _, most = self.server.replicas.partition(":")
        return (int(least), int(most or least)) if least.isdecimal() and (most or least).isdecimal() else (0, 0)

    @property
    def engine_room(self) -> int:
        """Requests that one engine has at a time: a batch that runs, and one that can join it at any step."""
        return 2 * self.server.batch

    @property
    def device(self) -> str:
        """Of one engine; Ray gives it its own GPU, which is the first that it sees."""
        return self.server.first_device


@dataclass
class Offer(Mapping[str, ServedModel]):
    """Names to bundles, exchanged as a whole while others read; empty before the first `change`.

    Attributes:
        settings: of the cluster.
        catalog: the present one.
    """

    settings: ClusterSettings
    catalog: Mapping[str, ServedModel] = field(default_factory=dict)

    def change(self, config: Mapping[str, Any]) -> None:
        """Offer the bundles of a deployment's `user_config`: `{"bundles": {NAME: {"folder": ..., "digest": ...}}}`.

        Raises:
            InputError: a bundle that is not there, or has another digest: what was offered before stays.
        """
        bundles: Bundles = config["bundles"]
        self.catalog = Catalog([f"{name}={bundle['folder']}" for name, bundle in bundles.items()],
                               [f"{name}={bundle['digest']}" for name, bundle in bundles.items()],
                               device=self.settings.device, deterministic=self.settings.server.deterministic)

    def __getitem__(self, name: str) -> ServedModel:
        return self.catalog[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.catalog)

    def __len__(self) -> int:
        return len(self.catalog)


def user_config(bundles: Sequence[str], digests: Sequence[str] = (), device: str = "cpu") -> dict[str, Any]:
    """What `Offer.change` takes, of bundles as `serve` is given them. Their digests are taken now: every replica serves
    the same ones.

    Raises:
        InputError: not a bundle, or one that is not to be served.
    """
    catalog = Catalog(bundles, digests, device=device)
    return {"bundles": {name: {"folder": str(model.folder.resolve()), "digest": model.digest}
                        for name, model in catalog.items()}}
