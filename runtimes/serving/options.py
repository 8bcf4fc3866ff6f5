"""Every option of `deploy serve` and `deploy serve-engine`: name, help text, default and range, written here once.

The command line is made of these fields (deploy/cli/derived_options.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from runtimes.errors import InputError
from runtimes.system.byte_sizes import parse_bytes

LOOPBACK = ("127.0.0.1", "::1", "localhost")
SAFETY = ("off", "flag", "replace")
LOG_FORMATS = ("text", "json")


def option(default: Any, help: str, /, **limits: Any) -> Any:
    """A field that is an option of `serve`.

    Args:
        default: its value where it is not given.
        help: what it does, without range, choices and default.
        limits: attributes of `deploy.cli.derived_options.Option`: `choices`, `least`, `most`, `above`, `flags`, `type`,
            and `default` in words.
    """
    return field(default=default, metadata={"help": help, **limits})


def check_ranges(options: Any) -> None:
    """Compare the fields of a dataclass with the choices and ranges of their metadata.

    Raises:
        InputError: the first that is outside.
    """
    for declared in fields(options):
        said, value, where = declared.metadata, getattr(options, declared.name), f"--{declared.name.replace('_', '-')}"
        if "choices" in said and value not in said["choices"]:
            raise InputError(f"{value!r} is none of its values", where=where,
                             fix=f"one of {', '.join(said['choices'])}")
        bounds = {word: said[key] for key, word in (("least", "at least"), ("most", "at most"), ("above", "above"))
                  if key in said}
        if value < said.get("least", value) or value > said.get("most", value) or (
                "above" in said and value <= said["above"]):
            raise InputError(f"{value} is out of range", where=where,
                             fix=", ".join(f"{word} {bound}" for word, bound in bounds.items()))


@dataclass(frozen=True)
class EngineOptions:
    """How the engines of this machine run.

    Raises:
        InputError: a value outside its range.
    """

    device: str = option("cpu", "devices to run on, separated by commas: cpu, cuda:0, cuda:1, tensorrt:0; one worker "
                         "each, of the CPU one for each group of cores; none leaves it to engines that join")
    workers: int = option(0, "worker processes on the CPU; the cores are divided among them", least=0,
                          default="one for every 8 cores")
    memory: str = option("", "memory that the loaded bundles of one worker may take, as 6GB; the one used longest ago "
                         "is unloaded first", default="80 % of what the container or machine has, divided by workers")
    batch: int = option(8, "images that one worker denoises side by side", least=1, most=64)
    deterministic: bool = option(False, "the same bytes for the same request whatever shares its calls, also where a "
                                 "network depends on the number of rows")
    reload_seconds: float = option(2.0, "how often bundles are looked at for changes; 0 never reloads", least=0)
    log_format: str = option("text", "form of the log's lines", choices=LOG_FORMATS)
    engine_key_file: str = option("", "file with the key by which engines of other machines and their server know each "
                                  "other", default="none")

    def __post_init__(self) -> None:
        """Check every field."""
        check_ranges(self)
        if self.memory:
            parse_bytes(self.memory, "--memory")

    @property
    def first_device(self) -> str:
        """That bundles are described for; the CPU where others have the devices."""
        return "cpu" if self.device == "none" else self.device.split(",")[0]


@dataclass(frozen=True)
class ServerOptions(EngineOptions):
    """How a server listens, runs, stores and limits.

    Raises:
        InputError: a value outside its range, or values that do not go together.
    """

    host: str = option("127.0.0.1", "address to listen on; any but the loopback needs --api-key-file")
    port: int = option(8000, "port to listen on; 0 takes a free one and prints it", least=0, most=65535)
    root_path: str = option("", "path under which a proxy shows the server, as /images", default="none")
    queue: int = option(256, "requests that may wait; more are answered with 429", least=1)
    digest: tuple[str, ...] = option((), "serve a bundle only if its digest begins so: DIGEST, or NAME=DIGEST where "
                                     "several are served; may be given again", type=list[str], default="any")

    state: str = option("", "folder of jobs and images, which survive a restart; one server at a time has it open",
                        default="a new folder below the cache root for each port")
    keep_hours: float = option(168.0, "ended jobs and their images are forgotten after so many hours", above=0)
    keep_bytes: str = option("10GB", "images of ended jobs may take so much; the oldest are forgotten first")
    cache_bytes: str = option("0", "cache of finished images by request and bundle, as 2GB; 0 caches nothing",
                              default="0")

    api_key_file: str = option("", "file with one API key a line, each NAME:KEY or KEY", default="no key is asked for")
    rate_limit: float = option(0.0, "images that one key may ask for in a minute; 0 is no limit", least=0)
    public_images: bool = option(False, "image addresses work without signature")
    safety: str = option("flag", "what is done with images that the bundle's safety checker flags: nothing is looked "
                         "at, they are marked, or replaced by black", choices=SAFETY)
    metadata: bool = option(True, "write prompt, seed and bundle digest into images",
                            flags=("--metadata/--no-metadata",))
    cors: tuple[str, ...] = option((), "origin of web pages that may use the server; may be given again",
                                   type=list[str], default="none")
    max_body: str = option("32MB", "largest body of a request")
    max_pixels: int = option(4_194_304, "pixels of an image that is asked for or sent, height times width", least=1)
    max_images: int = option(8, "images of one request", least=1, most=64)
    max_steps: int = option(150, "denoising steps of one request", least=1)

    telemetry: str = option("", "address that receives OpenTelemetry traces (OTLP over HTTP); needs the extra "
                            "[telemetry]", default="none")
    engine_port: int = option(0, "port on which engines of other machines may join, with --engine-key-file; see "
                              "`deploy serve-engine`", least=0, most=65535, default="none may")
    ray: bool = option(False, "run as Ray Serve deployments on the Ray cluster that RAY_ADDRESS names, or a new local "
                       "one; needs the extra [ray]")
    replicas: str = option("1:4", "with --ray: fewest and most engine replicas, scaled by requests under way")

    def __post_init__(self) -> None:
        """Check every field, then what fields say of each other."""
        super().__post_init__()
        for name in ("keep_bytes", "cache_bytes"):
            parse_bytes(getattr(self, name), f"--{name.replace('_', '-')}", least=0)
        parse_bytes(self.max_body, "--max-body")
        if self.telemetry and not self.telemetry.startswith(("http://", "https://")):
            raise InputError(f"{self.telemetry!r} is no address", where="--telemetry",
                             fix="for example http://127.0.0.1:4318/v1/traces")
        if self.host not in LOOPBACK and not self.api_key_file:
            raise InputError(f"{self.host} can be reached by others, and no key is asked for", where="--host",
                             fix="give --api-key-file, or listen on 127.0.0.1")
        if self.device == "none" and not self.engine_port:
            raise InputError("nothing would generate", where="--device",
                             fix="give a device, or --engine-port for engines that join")
        if self.engine_port and not self.engine_key_file:
            raise InputError("engines of other machines need a key", where="--engine-port",
                             fix="give --engine-key-file")
