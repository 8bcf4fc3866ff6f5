"""`manifest.json` as frozen dataclasses: parsed with clear errors, written canonically, with a digest of its contents.

What was `measured` (seconds, memory, host, time, parity figures) is kept apart and left out of the digest:
the same source, spec and tool versions give the same digest.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Union, get_args, get_origin, get_type_hints

from runtimes.bundle.details import DETAILS_OF, D, Details, GraphDetails, SourceDetails, Sparse
from runtimes.bundle.measurements import LARGEST, check_component_parity, check_measured, check_parity
from runtimes.bundle.older_schema import rebuild_command
from runtimes.bundle.roles import Roles, check_roles
from runtimes.bundle.tensors import Axis, TensorSpec
from runtimes.errors import BundleError, InputError

SCHEMA = 2
MANIFEST_FILE = "manifest.json"
DEFAULT_STEPS = 25  # ours, for every model; diffusers' classes say 50. Other defaults are the model's: roles.ModeFacts


@dataclass(frozen=True)
class FileRecord:
    """Size and content hash of one file of the bundle."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Component:
    """One network of the pipeline as it lies in the bundle.

    Attributes:
        format: key of `runtimes.backends.session.FORMATS`, or "safetensors" before export.
        file: the entry file, relative to the bundle; `files` holds it and everything it refers to.
        class_name: the PyTorch class it came from, as model_index.json names it.
        precision: "fp32", "fp16", "int8", ...: what most of its weights are stored in.
        details: facts that only one format has, and what became of the network on its way there.
        parity: figures of the component-level comparison, or nothing if unverified.
    """

    format: str
    file: str
    files: Mapping[str, FileRecord]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    axes: Mapping[str, Axis]
    class_name: str
    precision: str
    parameters: int
    details: Details = field(default_factory=Details)
    parity: Mapping[str, Any] | None = None

    @classmethod
    def json_kinds(cls, value: Mapping[str, Any]) -> Mapping[str, Any]:
        """Kinds of fields that depend on the others: details are those of the format."""
        found = value.get("format")
        return {"details": DETAILS_OF.get(found, Details) if isinstance(found, str) else Details}

    @property
    def graph(self) -> GraphDetails:
        """What passes made of the graph; nothing, of a network that is none yet."""
        return self.details if isinstance(self.details, GraphDetails) else GraphDetails()

    @property
    def takes(self) -> tuple[str, ...]:
        """What the network itself calls its inputs, before export."""
        own = self.details.takes if isinstance(self.details, SourceDetails) else ()
        return own or tuple(spec.name for spec in self.inputs)

    @property
    def gives(self) -> tuple[str, ...]:
        """What the network itself calls its outputs, before export."""
        own = self.details.gives if isinstance(self.details, SourceDetails) else ()
        return own or tuple(spec.name for spec in self.outputs)

    def details_as(self, kind: type[D]) -> D:
        """The details, of a component that must have this kind.

        Raises:
            InputError: it is of another format.
        """
        if not isinstance(self.details, kind):
            formats = " or ".join(name for name, known in DETAILS_OF.items() if known is kind)
            raise InputError(f"{self.file} is {self.format}, expected {formats}")
        return self.details

    @property
    def bytes(self) -> int:
        """Size of all files together; weights that lie with another component count there."""
        shared = self.graph.shared_weights
        return sum(record.bytes for name, record in self.files.items() if shared is None or name != shared.file)

    @property
    def sha256(self) -> str:
        """One hash over the names and contents of all files."""
        return digest_of({name: record.sha256 for name, record in self.files.items()})


@dataclass(frozen=True)
class PassRecord:
    """A pass that ran: enough to run it again."""

    name: str
    version: int
    config: Mapping[str, Any]


@dataclass(frozen=True)
class Source:
    """Where the bundle came from: an id without local folders, and the hash of every weight file.

    Attributes:
        id: OWNER/NAME of a model on the Hugging Face Hub, else the name of its folder.
        sha256: of the weight files, by their path in the model.
        revision: the commit of a model on the Hub, else empty.
    """

    id: str
    sha256: Mapping[str, str]
    revision: str = ""


@dataclass(frozen=True)
class Manifest:
    """Everything about a bundle except the bytes of its files."""

    schema: int
    family: str
    source: Source
    target: str
    precision: str
    pipeline: Roles
    components: Mapping[str, Component]
    passes: tuple[PassRecord, ...]
    files: Mapping[str, FileRecord]
    tools: Mapping[str, str]
    spec: Mapping[str, Any]
    verified: bool
    parity: Mapping[str, Any] | None = None
    measured: Mapping[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """sha256 over what the bundle is; measurements are left out."""
        content = to_json(self)
        for key in ("measured", "parity", "verified"):
            del content[key]
        for component in content["components"].values():
            del component["parity"]
        return digest_of(content)

    def all_files(self) -> dict[str, FileRecord]:
        """Every file the manifest vouches for: the components', tokenizers and scheduler, the report."""
        records = dict(self.files)
        for component in self.components.values():
            records.update(component.files)
        records.update(from_json(Mapping[str, FileRecord], self.measured.get("files", {}),
                                 f"{MANIFEST_FILE}.measured.files"))
        return records


def digest_of(value: Any) -> str:
    """sha256 of canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def to_json(value: Any) -> Any:
    """Dataclasses, mappings and tuples as plain JSON values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        pairs = [(f, getattr(value, f.name)) for f in dataclasses.fields(value)]
        return {_key(f): to_json(v) for f, v in pairs if not isinstance(value, Sparse) or v != f.default}
    if isinstance(value, Mapping):
        return {str(k): to_json(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(v) for v in value]
    return value


def from_json(kind: Any, value: Any, where: str) -> Any:
    """Build `kind` from a JSON value.

    Raises:
        BundleError: naming the key path at which the value does not fit. Unknown keys are refused too: a newer
            writer must raise the schema version instead.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        return _from_union(arguments, value, where)
    if dataclasses.is_dataclass(kind):
        return _from_object(kind, value, where)
    if origin is tuple and isinstance(value, list):
        return tuple(from_json(arguments[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if origin is not None and origin is not tuple and isinstance(value, dict):
        return {k: from_json(arguments[1], v, f"{where}.{k}") for k, v in value.items()}
    if type(value) is int and abs(value) >= LARGEST:
        raise BundleError("expected a number of 64 bits, found a larger one", where=where)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is float and not math.isfinite(value):
        raise BundleError("expected a finite number", where=where)
    if isinstance(kind, type) and type(value) is kind:
        return value
    raise BundleError(f"expected {getattr(kind, '__name__', kind)}, found {value!r:.60}", where=where)


def _from_union(kinds: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in kinds:
        return None
    problem = BundleError(f"unexpected value {value!r:.60}", where=where)
    for kind in kinds:
        if kind is not type(None):
            try:
                return from_json(kind, value, where)
            except BundleError as error:
                problem = error
    raise problem


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def _from_object(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise BundleError(f"expected an object, found {value!r:.60}", where=where)
    fields = {_key(f): f for f in dataclasses.fields(kind)}
    hints = _hints(kind)
    if hasattr(kind, "json_kinds"):
        hints = hints | kind.json_kinds(value)
    required = {key for key, f in fields.items()
                if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING}
    if missing := sorted(required - set(value)):
        raise BundleError(f"missing {', '.join(missing)}", where=where)
    if unknown := sorted(set(value) - set(fields)):
        raise BundleError(f"unknown key {', '.join(unknown)}", where=where)
    found = {fields[k].name: from_json(hints[fields[k].name], v, f"{where}.{k}") for k, v in value.items()}
    try:
        return kind(**found)
    except InputError as error:  # values that do not fit together
        raise BundleError(error.what, where=where) from error


def _key(place: dataclasses.Field[Any]) -> str:
    """What a field is called in JSON, where that is no name in Python or stands for something else."""
    key: str = place.metadata.get("key", place.name)
    return key


def safe_path(name: str) -> PurePosixPath:
    """A relative path that stays inside the bundle.

    Raises:
        BundleError: absolute, with `..`, with a backslash or drive, or empty.
    """
    path = PurePosixPath(name)
    if not name or path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name or "\0" in name:
        raise BundleError(f"the path {name!r} leaves the bundle", where=MANIFEST_FILE,
                          fix="do not use this bundle; get it again from where it was built")
    return path


def parse(text: str, where: str) -> Manifest:
    """Read a manifest.

    Raises:
        BundleError: not JSON, another schema, a missing or unknown key, a path that leaves the bundle.
    """
    try:
        raw = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"not valid JSON: {error}", where=where) from error
    raw = raw if isinstance(raw, dict) else {}
    schema = raw.get("schema")
    if schema != SCHEMA:
        newer = isinstance(schema, int) and schema > SCHEMA
        raise BundleError(
            f"manifest schema {schema!r:.20}, this version of ldm-deploy reads {SCHEMA}", where=where,
            fix="upgrade ldm-deploy" if newer else f"build the bundle again: {rebuild_command(raw)}")
    manifest: Manifest = from_json(Manifest, raw, Path(where).name)
    for name, component in manifest.components.items():
        if component.file not in component.files:
            raise BundleError(f"{component.file} is not among the files of {name}", where=where)
    for name, component in manifest.components.items():
        check_component_parity(component.parity, f"{Path(where).name}.components.{name}.parity")
    try:
        check_roles(manifest.pipeline, manifest.components)
    except InputError as error:
        raise BundleError(error.what, where=f"{Path(where).name}.pipeline", fix="build the bundle again") from error
    check_parity(manifest.parity, f"{Path(where).name}.parity")
    check_measured(manifest.measured, f"{Path(where).name}.measured")
    for name in manifest.all_files():
        safe_path(name)
    return manifest


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def dumps(manifest: Manifest) -> str:
    """Text of manifest.json: sorted keys, so that equal manifests are equal files."""
    return json.dumps(to_json(manifest), sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
