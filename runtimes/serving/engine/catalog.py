"""`Catalog`: the bundles that a server offers, by name: what their manifests say of them. No network is loaded here.

    catalog = Catalog(["emoji=build/emoji", "build/landscapes"])
    catalog["landscapes"].digest
    catalog.refresh()              # -> names whose bundle was built again since
"""

from __future__ import annotations

import calendar
import logging
import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from runtimes.backends.batching import Listed
from runtimes.bundle.folder import Bundle, read_object
from runtimes.bundle.manifest import MANIFEST_FILE, Manifest
from runtimes.bundle.tensors import ShapeRange
from runtimes.errors import DeployError, InputError, UnavailableError
from runtimes.inputs import quality_presets
from runtimes.inputs.aspect_ratios import nearest_size, parse_aspect
from runtimes.inputs.resolved_request import pixel_limits
from runtimes.pipeline.batch_facts import BatchFacts
from runtimes.pipeline.initial_latents import inpaints
from runtimes.schedulers import SCHEDULERS, from_config
from runtimes.system.checked_files import state_of
from runtimes.system.device import CPU, Device

logger = logging.getLogger(__name__)

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
DIGEST = re.compile(r"[0-9a-f]{8,64}")
# What a client calls a quality -> what `deploy tradeoffs` calls it.
QUALITIES = {"draft": "draft", "standard": "balanced", "high": "high"}
State = tuple[tuple[str, tuple[int, ...]], ...]


@dataclass(frozen=True)
class ServedModel:
    """One bundle under its name, as its manifest describes it.

    Attributes:
        name: that requests give.
        folder: of the bundle.
        digest: sha256 of what the bundle is, 64 hexadecimal digits.
        created: when it was built, in seconds since 1970.
        family, precision: as the manifest has them.
        height, width: of an image by default, in pixels.
        heights, widths: the range in pixels, of which `min` and `max` count, and what sizes are multiples of.
        schedulers: names that requests may give.
        edits: whether it takes an image, and a mask over one.
        inpaints: whether its denoiser was trained for masks; without, a mask keeps what it covers all the same.
        takes_prompt: whether it is steered by text.
        has_safety_checker: whether it can judge images.
        exact: whether the bytes of an image are the same whatever shares its calls, on this machine.
        bytes: of its components' files.
        presets: "draft", "standard" and "high" -> fields of `Request`; without measurements "standard" alone, empty.
    """

    name: str
    folder: Path
    digest: str
    created: int
    family: str
    precision: str
    height: int
    width: int
    heights: tuple[ShapeRange, int]
    widths: tuple[ShapeRange, int]
    schedulers: tuple[str, ...]
    edits: bool
    inpaints: bool
    takes_prompt: bool
    has_safety_checker: bool
    exact: bool
    bytes: int
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def preset(self, quality: str) -> Mapping[str, Any]:
        """Fields of `Request` that a quality stands for.

        Raises:
            InputError: no such quality.
            UnavailableError: it was not measured of this bundle on this machine.
        """
        if quality not in QUALITIES:
            raise InputError(f"unknown quality {quality!r:.60}", where="quality", fix=f"one of {', '.join(QUALITIES)}")
        if quality not in self.presets:
            raise UnavailableError(f"the quality {quality} was not measured of {self.name} on this server",
                                   where="quality", fix="run `python -m deploy tradeoffs BUNDLE` there once, or ask "
                                   "for standard, or give steps and scheduler")
        return self.presets[quality]

    def size_of(self, aspect: str) -> tuple[int, int]:
        """Height and width in pixels nearest to an aspect ratio as 16:9, at about the pixels of the model's own size.

        Raises:
            InputError: not an aspect ratio.
        """
        return nearest_size(parse_aspect(aspect), self.height * self.width, self.heights, self.widths)


class Catalog(Mapping[str, ServedModel]):
    """Names to bundles. Any thread may read while another refreshes; what was looked up stays as it was."""

    def __init__(self, bundles: Sequence[str | Path], digests: Sequence[str] = (), *, device: str | Device = CPU,
                 deterministic: bool = False) -> None:
        """Open every bundle: files are compared with their hashes.

        Args:
            bundles: `NAME=FOLDER`, or `FOLDER` whose own name is taken.
            digests: `NAME=DIGEST`, or `DIGEST` of the only bundle: it is served only if its digest begins so. Several
                of one name allow any of them.
            device: that will run them, which `ServedModel.exact` depends on.
            deterministic: whether they will be loaded so.

        Raises:
            InputError: a name that cannot be used or is given twice, a pin of nothing, or a bundle with another digest.
            BundleError: not a bundle, or one that is broken.
        """
        self._device, self._deterministic = Device.parse(device), deterministic
        folders = _named(bundles)
        self._pins = _pins(digests, folders)
        self._lock = threading.Lock()
        self._states: dict[str, State] = {name: _state(folder) for name, folder in folders.items()}
        self._models = {name: self._opened(name, folder) for name, folder in folders.items()}

    def __getitem__(self, name: str) -> ServedModel:
        return self._models[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._models)

    def __len__(self) -> int:
        return len(self._models)

    def refresh(self) -> list[str]:
        """Look at the folders again.

        A bundle that is being copied, is broken, or has a digest that is not allowed changes nothing: the one before
        stays, the reason is logged, and it is looked at again once a file of it changes.

        Returns:
            names whose bundle has another digest now.
        """
        changed = []
        with self._lock:
            for name, model in list(self._models.items()):
                new = self._looked_at(name, model)
                if new != model:
                    self._models = {**self._models, name: new}
                if new.digest != model.digest:
                    changed.append(name)
                    logger.info("%s: now serving the bundle %.12s, before %.12s", name, new.digest, model.digest)
        return changed

    def _looked_at(self, name: str, model: ServedModel) -> ServedModel:
        state = _state(model.folder)
        if state == self._states[name]:
            return replace(model, presets=_presets(model.digest))  # they may have been measured in the meantime
        try:
            new = self._opened(name, model.folder)
        except (DeployError, OSError) as error:
            logger.warning("%s: still serving the bundle %.12s, since the folder holds no other: %s", name,
                           model.digest, error)
            new = model
        self._states[name] = state
        return new

    def _opened(self, name: str, folder: Path) -> ServedModel:
        bundle = Bundle.open(folder, trust_notes=True)
        allowed, digest = self._pins.get(name, ()), bundle.manifest.digest
        if allowed and not digest.startswith(allowed):
            raise InputError(f"the digest of {name} is {digest}, not {' or '.join(allowed)}", where="--digest",
                             fix="serve the bundle that was meant, or give its digest")
        return described(name, bundle, self._device, deterministic=self._deterministic)


def described(name: str, bundle: Bundle, device: Device = CPU, *, deterministic: bool = False) -> ServedModel:
    """What a server has to know of a bundle.

    Raises:
        BundleError: the bundle says of itself what cannot be.
    """
    manifest = bundle.manifest
    roles, parts = manifest.pipeline, {name: Listed(name, part) for name, part in manifest.components.items()}
    denoiser = parts[roles.denoiser.component]
    return ServedModel(
        name=name, folder=bundle.path, digest=manifest.digest, created=_created(bundle), family=manifest.family,
        precision=manifest.precision, height=roles.codec.height, width=roles.codec.width,
        heights=pixel_limits(roles, parts, "height"), widths=pixel_limits(roles, parts, "width"),
        schedulers=_schedulers(read_object(bundle.file(roles.process.scheduler))),
        edits=roles.codec.encoder.component in parts, inpaints=inpaints(denoiser, roles),
        takes_prompt=bool(roles.encoders), has_safety_checker=bool(roles.safety_checker),
        exact=_exact(manifest, device, deterministic),
        bytes=sum(part.bytes for part in manifest.components.values()), presets=_presets(manifest.digest))


def _named(bundles: Sequence[str | Path]) -> dict[str, Path]:
    folders: dict[str, Path] = {}
    for given in bundles:
        text = str(given)
        name, equals, path = text.partition("=")
        if not equals or Path(text).is_dir():
            name, path = Path(text).resolve().name, text
        if not NAME.fullmatch(name):
            raise InputError(f"{name!r} is no name for a bundle", where=text,
                             fix="give NAME=FOLDER, of letters, digits, dots, dashes and underscores")
        if name in folders:
            raise InputError(f"two bundles are named {name}", where=text, fix="give one of them another: NAME=FOLDER")
        folders[name] = Path(path).absolute()
    if not folders:
        raise InputError("no bundle to serve", where="bundles", fix="give the folder that `build` wrote")
    return folders


def _pins(digests: Sequence[str], folders: Mapping[str, Path]) -> dict[str, tuple[str, ...]]:
    pins: dict[str, tuple[str, ...]] = {}
    for given in digests:
        name, equals, digest = given.rpartition("=")
        if not equals and len(folders) > 1:
            raise InputError(f"{given} may be of any of {len(folders)} bundles", where="--digest",
                             fix="give NAME=DIGEST")
        name = name if equals else next(iter(folders))
        if name not in folders:
            raise InputError(f"no bundle is named {name!r}", where="--digest", fix=f"one of {', '.join(folders)}")
        if not DIGEST.fullmatch(digest.lower()):
            raise InputError(f"{digest!r:.80} is no digest", where="--digest",
                             fix="give its first 8 to 64 hexadecimal digits, as `deploy inspect` prints it")
        pins[name] = (*pins.get(name, ()), digest.lower())
    return pins


def _state(folder: Path) -> State:
    """What changes when any file of a folder does; nothing of a folder that is not there now."""
    found = []
    try:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                found.append((str(file), state_of(file)))
    except OSError:  # it is being replaced
        return ()
    return tuple(found)


def _created(bundle: Bundle) -> int:
    try:
        return calendar.timegm(time.strptime(bundle.manifest.measured["built_at"], "%Y-%m-%dT%H:%M:%SZ"))
    except (KeyError, ValueError):
        return int((bundle.path / MANIFEST_FILE).stat().st_mtime)


def _schedulers(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Sampling methods that run over the bundle's noise schedule."""

    def fits(name: str) -> bool:
        try:
            from_config(config, name)
        except InputError:
            return False
        return True

    return tuple(filter(fits, SCHEDULERS))


def _exact(manifest: Manifest, device: Device, deterministic: bool) -> bool:
    """Prompts and images are encoded together only where that is exact, so denoiser and decoder decide."""
    if deterministic:
        return True
    facts, roles = BatchFacts.of(manifest, device), manifest.pipeline
    deciding = {roles.denoiser.component, roles.codec.decoder.component,
                *(entry.component for entry in roles.denoiser.entries.values())}
    return all(facts.exact(component) or not facts.shares(component) for component in deciding)


def _presets(digest: str) -> dict[str, Mapping[str, Any]]:
    try:
        measured = quality_presets.load(digest)
    except UnavailableError:
        return {"standard": {}}
    return {quality: quality_presets.preset(known, measured).setting.options() for quality, known in QUALITIES.items()}
