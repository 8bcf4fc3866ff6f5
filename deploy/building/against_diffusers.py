"""Compares a build or a bundle with diffusers' own pipeline: decides when, in which process, and caches the result.

`deploy.parity.upstream` does the comparing. Weights and feeds are compared in every build that compares anything, of
any size; images where the model is small enough for the effort that was chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from deploy.core.isolation import ABOVE_BYTES, call_isolated, from_request, to_request
from deploy.core.pass_cache import Cache, versions_of
from deploy.core.spec import BuildSpec
from deploy.model.source_folder import own_folder
from deploy.parity.comparison_effort import Effort
from deploy.parity.reference.answers import total_bytes
from deploy.parity.upstream.asked_model import Upstream
from deploy.parity.upstream.asked_requests import IMAGE, MASK, TEXT, Asked
from deploy.parity.upstream.levels import (
    Level,
    Levels,
    compare_bundle_feeds,
    compare_bundle_images,
    compare_source,
    identity,
)
from deploy.passes.adapters import parse_embedding
from runtimes.adapters.lora_files import parse_lora
from runtimes.backends.session import SessionOptions
from runtimes.bundle.folder import Bundle
from runtimes.bundle.manifest import from_json, to_json

IMAGE_STEPS = 8
LIBRARIES = ("accelerate", "diffusers", "numpy", "peft", "safetensors", "tokenizers", "torch", "transformers")


def upstream_of(spec: BuildSpec) -> Upstream:
    """What a spec means in diffusers' terms.

    Raises:
        InputError: the model is not there, or an option of an adapter cannot be read.
    """
    return Upstream(own_folder(spec).absolute(), Path(spec.vae) if spec.vae else None,
                    tuple(parse_lora(option) for option in spec.lora),
                    tuple(parse_embedding(option) for option in spec.embedding), spec.variant)


class AgainstDiffusers:
    """One model, compared with what diffusers makes of the same files.

    Attributes:
        peak_rss_bytes: the highest resident memory of a process that compared apart from this one.
    """

    def __init__(self, upstream: Upstream, source: Bundle, cache: Cache) -> None:
        """Take the source bundle, after its adapters."""
        self.peak_rss_bytes = 0
        self._upstream, self._source, self._cache = upstream, source, cache
        self._large = total_bytes(source.manifest.components) > ABOVE_BYTES

    def source_levels(self) -> Levels:
        """Levels *weights* and *feeds* of the source."""
        found = self._remembered("source", self._source, lambda: self._call("source", self._source))
        return {name: _level(content) for name, content in found.items()}

    def feeds_of(self, bundle: Bundle) -> Level | None:
        """Level *feeds* of a bundle whose facts, tokenizers or scheduler are not the source's; None where they are."""
        if _speech(bundle) == _speech(self._source):
            return None
        found = self._remembered("feeds", bundle, lambda: self._call("feeds", bundle))
        return _level(found["feeds"])

    def images(self, bundle: Bundle | None, effort: Effort, least_db: float) -> Level:
        """Level *images*, of the source and, where it runs here, of a bundle.

        Args:
            bundle: None where nothing here runs it.
            effort: how much is generated.
            least_db: budget of the bundle's images.
        """
        if effort.level == "components":
            return Level(unverified=(f"no image is generated: {effort.why}",))
        asked = {"requests": [to_json(asked) for asked in image_requests(effort, self._source)],
                 "options": to_json(effort.options.session), "least_db": least_db}
        return _level(self._call("images", bundle, **asked)["images"])

    def _remembered(self, kind: str, bundle: Bundle, compute: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
        """A comparison that found no difference is not made again for the same files, code and libraries."""
        components = {name: c.sha256 for name, c in self._source.manifest.components.items()}
        key = {"kind": f"against diffusers: {kind}", "components": components, "speech": _speech(bundle),
               "upstream": identity(self._upstream), "libraries": versions_of(LIBRARIES)}
        if (known := self._cache.find_fact(key)) is not None:
            return known
        found = compute()
        if not any(content["different"] for content in found.values()):
            self._cache.store_fact(key, found)
        return found

    def _call(self, kind: str, bundle: Bundle | None, **more: Any) -> Mapping[str, Any]:
        request = {"kind": kind, "upstream": _to_json(self._upstream), "source": to_request(self._source),
                   "bundle": None if bundle is None else to_request(bundle), "large": self._large, **more}
        if not self._large:
            return compare_request(request)
        found, peak = call_isolated("deploy.building.against_diffusers:compare_request", request,
                                    "comparing with diffusers")
        self.peak_rss_bytes = max(self.peak_rss_bytes, peak)
        result: Mapping[str, Any] = found
        return result


def compare_request(request: Mapping[str, Any]) -> dict[str, Any]:
    """What `AgainstDiffusers` does, in this process or in a child: JSON in, JSON out."""
    upstream, source = _from_json(request["upstream"]), from_request(request["source"])
    bundle = None if request["bundle"] is None else from_request(request["bundle"])
    levels: Levels
    if request["kind"] == "images":
        asked = [from_json(Asked, content, "request") for content in request["requests"]]
        options: SessionOptions = from_json(SessionOptions, request["options"], "options")
        levels = {"images": compare_bundle_images(upstream, source, bundle, asked, options, request["least_db"],
                                                  one_at_a_time=request["large"])}
    elif request["kind"] == "feeds" and bundle is not None:
        levels = {"feeds": compare_bundle_feeds(upstream, source, bundle)}
    else:
        levels = compare_source(upstream, source)
    return {name: to_json(level) for name, level in levels.items()}


def image_requests(effort: Effort, source: Bundle) -> tuple[Asked, ...]:
    """What the level *images* generates: text to image alone at a quick effort, every mode at a full one."""
    options, codec = effort.options, source.manifest.pipeline.codec
    size = options.height or codec.height, options.width or codec.width
    prompts = options.prompts[:2]
    text = Asked("text", TEXT, prompts, steps=min(options.steps, IMAGE_STEPS), size=size)
    if effort.level != "full":
        return (replace(text, prompts=prompts[:1]),)
    return (text, replace(text, name="image", mode=IMAGE, prompts=prompts[:1]),
            replace(text, name="mask", mode=MASK, prompts=prompts[:1]))


def _speech(bundle: Bundle) -> Any:
    """What of a bundle besides its networks decides what it feeds them: facts, tokenizers, scheduler."""
    manifest = bundle.manifest
    own = {name: r.sha256 for name, r in manifest.files.items() if not name.startswith(("lora/", "feature_extractor/"))}
    return [to_json(manifest.pipeline), own]


def _level(content: Mapping[str, Any]) -> Level:
    level: Level = from_json(Level, dict(content), "level")
    return level


def _to_json(upstream: Upstream) -> dict[str, Any]:
    pairs = {name: [[str(file), value] for file, value in getattr(upstream, name)] for name in ("loras", "embeddings")}
    return {"folder": str(upstream.folder), "vae": str(upstream.vae or ""), "variant": upstream.variant, **pairs}


def _from_json(content: Mapping[str, Any]) -> Upstream:
    def pairs(name: str) -> tuple[tuple[Path, Any], ...]:
        return tuple((Path(file), value) for file, value in content[name])

    return Upstream(Path(content["folder"]), Path(content["vae"]) if content["vae"] else None, pairs("loras"),
                    pairs("embeddings"), content["variant"])
