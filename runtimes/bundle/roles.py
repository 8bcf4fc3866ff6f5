"""What each network of a bundle is for and what it is called (text encoder, denoiser, ...): the manifest's `pipeline`.

Code asks for roles, never for a name. A family (`exporters.families`, most of it in `parts`) fills these in: it says
which component encodes the prompt, denoises, encodes and decodes images, and what their inputs and outputs are called.
Whatever no family has said yet has a default that changes nothing. Names of axes are no part of this: every component's
are "batch", "height", "width" and "sequence", in pixels "image_height" and "image_width".
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from runtimes.bundle.tensors import TensorSpec
from runtimes.errors import InputError

SCHEDULER_FILE = "scheduler/scheduler_config.json"
SHALLOW_ENTRY = "shallow"  # the entry that reuses a deep feature of an earlier step
PROMPT = "{prompt}"
# What a number that a denoiser takes as an input may mean: sizes and crops in pixels, a score from 0 to 10.
NUMBERS = ("original_height", "original_width", "crop_top", "crop_left", "target_height", "target_width",
           "aesthetic_score")
NEGATIVE, POSITIVE = "negative", "positive"


class Described(Protocol):
    """A network's inputs and outputs: a component of a manifest, or of a family before there is one."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What it takes."""

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """What it gives."""


class Role(enum.StrEnum):
    """What a component is for: decides its wrapper, its fusions, its quantization and what it is compared by."""

    TEXT_ENCODER = "text encoder"
    DENOISER = "denoiser"
    SHALLOW = "shallow denoiser"
    IMAGE_ENCODER = "image encoder"
    IMAGE_DECODER = "image decoder"
    SAFETY_CHECKER = "safety checker"
    OTHER = "other"


@dataclass(frozen=True)
class TextEncoder:
    """One network that reads the prompt.

    Attributes:
        component: its name in the bundle.
        tokenizer: folder of its tokenizer in the bundle.
        tokens: length to which prompts are padded and cut.
        hidden: output (B, tokens, width) that the denoiser's context is made of; "" for an encoder that only pools.
        pooled: output (B, width) that the pooled embedding is made of; "" for an encoder that does not.
        ids: input of the token numbers, (B, tokens) int64.
        join: how `hidden` joins that of the encoders before: "features" beside it on the last axis, "tokens" after it
            on the axis of tokens, the narrower one padded with zeros.
        template: what the prompt is put into before it is tokenized, with {prompt} once; "" for the prompt alone.
        adapter: what files of LoRAs and embeddings call it: diffusers' folder of it, in most families.
    """

    component: str
    tokenizer: str
    tokens: int
    hidden: str
    pooled: str = ""
    ids: str = "input_ids"
    join: str = "features"
    template: str = ""
    adapter: str = ""

    def __post_init__(self) -> None:
        """Refuse what no prompt can be read by."""
        _one_of(self.join, ("features", "tokens"), f"join of {self.component}")
        _at_least(self.tokens, f"tokens of {self.component}")
        if not self.hidden and not self.pooled:
            raise InputError(f"the text encoder {self.component} gives neither hidden states nor a pooled embedding")
        if self.template and self.template.count(PROMPT) != 1:
            raise InputError(f"the template of {self.component} must hold {PROMPT} once")


@dataclass(frozen=True)
class Conditioner:
    """What the denoiser takes besides sample and timestep, and what that is made of.

    Attributes:
        encoders: in the order in which their hidden states are joined; none for a pipeline without prompts.
        context: denoiser input of the joined hidden states, (B, tokens, width); "" if it takes none.
        pooled: denoiser input of the pooled embeddings side by side, (B, width); "" if it takes none.
        numbers: denoiser input -> what each of its numbers means, of `NUMBERS`; (B, n).
        empty_negative: what stands for a negative prompt that is not given: the embedded empty "text" or "zeros".
    """

    encoders: tuple[TextEncoder, ...] = ()
    context: str = ""
    pooled: str = ""
    numbers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    empty_negative: str = "text"

    def __post_init__(self) -> None:
        """Refuse conditions that nothing gives."""
        _one_of(self.empty_negative, ("text", "zeros"), "empty_negative")
        for given, wanted, what in ((any(e.hidden for e in self.encoders), self.context, "hidden states"),
                                    (any(e.pooled for e in self.encoders), self.pooled, "a pooled embedding")):
            if wanted and not given:
                raise InputError(f"the denoiser takes {what} as {wanted}, which no text encoder gives")
        for name, meanings in self.numbers.items():
            for meaning in meanings:
                _one_of(meaning, NUMBERS, f"a number of {name}")


@dataclass(frozen=True)
class Entry:
    """Another way into the denoiser, taken at some steps instead of the whole network: the step cache's shallow graph.

    Attributes:
        component: its name in the bundle; it takes what the whole network takes, and
        features: outputs of the whole network at an earlier step, as inputs of the same names.
    """

    component: str
    features: tuple[str, ...]


@dataclass(frozen=True)
class Denoiser:
    """The network that is called at every step. Channels that it takes beyond the latents' are those of inpainting.

    Attributes:
        component: its name in the bundle.
        sample, timestep: inputs, (B, C, H/f, W/f) and (B,) float32.
        output: what it predicts, (B, C, H/f, W/f).
        entries: other ways into it, by `SHALLOW_ENTRY`.
        adapter: what files of LoRAs call it, with all of its entries.
    """

    component: str
    sample: str = "sample"
    timestep: str = "timestep"
    output: str = "out_sample"
    entries: Mapping[str, Entry] = field(default_factory=dict)
    adapter: str = ""

    def __post_init__(self) -> None:
        """Refuse entries that nobody would take."""
        for name in self.entries:
            _one_of(name, (SHALLOW_ENTRY,), "an entry")

    @property
    def shallow(self) -> Entry | None:
        """The entry that reuses deep features, of a bundle built with a step cache."""
        return self.entries.get(SHALLOW_ENTRY)


@dataclass(frozen=True)
class Coder:
    """One half of the autoencoder: component, its one input and its one output."""

    component: str
    input: str
    output: str


@dataclass(frozen=True)
class Codec:
    """The latent space: how images become latents of about unit variance, and back.

    latents = (encoded - shift_factor) * scaling_factor, or (encoded - latents_mean) * scaling_factor / latents_std.

    Attributes:
        encoder: pixels (B, 3, H, W) in -1..1 to what `gives` says.
        decoder: latents to pixels.
        latent_channels: C of the latents (B, C, H/f, W/f).
        factor: pixels per latent row or column, f.
        scaling_factor, shift_factor: as above.
        latents_mean, latents_std: one a channel, where the pipeline's class looks at them.
        gives: "moments" are mean and log-variance on the channels, "latents" are the encoded image itself.
        height, width: of an image by default, in pixels.
    """

    encoder: Coder
    decoder: Coder
    latent_channels: int
    factor: int
    scaling_factor: float
    height: int
    width: int
    gives: str = "moments"
    shift_factor: float = 0.0
    latents_mean: tuple[float, ...] = ()
    latents_std: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Refuse numbers that no latents can be scaled by."""
        _one_of(self.gives, ("moments", "latents"), "what the encoder gives")
        for name in ("latent_channels", "factor", "height", "width"):
            _at_least(getattr(self, name), name)
        numbers = (self.scaling_factor, self.shift_factor, *self.latents_mean, *self.latents_std)
        if not all(map(math.isfinite, numbers)) or 0 in (self.scaling_factor, *self.latents_std):
            raise InputError("the latents' scale, shift, mean or deviation is not finite, or a factor is 0")
        if {len(self.latents_mean), len(self.latents_std)} not in ({0}, {self.latent_channels}):
            raise InputError("latents_mean and latents_std have one number for each latent channel, or none")
        if self.shift_factor and self.latents_mean:
            raise InputError("latents have a shift_factor or a mean for each channel, not both")


@dataclass(frozen=True)
class ModeFacts:
    """What diffusers' pipeline class for one mode does by default.

    Attributes:
        pipeline_class: diffusers' class for the mode.
        guidance_scale, strength: defaults of its call; strength 1 where it has none.
        scheduler: keys of scheduler/scheduler_config.json that this class corrects to another value.
    """

    pipeline_class: str
    guidance_scale: float = 7.5
    strength: float = 1.0
    scheduler: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Process:
    """How noise is taken away.

    Attributes:
        kind: "beta" for a noise schedule of betas.
        scheduler: file of the scheduler's config in the bundle.
        modes: what is generated by default, by "text", "image" and "mask", as far as diffusers has a class for it.
    """

    kind: str = "beta"
    scheduler: str = SCHEDULER_FILE
    modes: Mapping[str, ModeFacts] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse what no sampler here runs."""
        _one_of(self.kind, ("beta",), "the kind of process")
        for name in self.modes:
            _one_of(name, ("text", "image", "mask"), "a mode")

    def mode(self, image: bool, mask: bool) -> ModeFacts:
        """What is generated by default with or without an initial image and a mask.

        A mode that diffusers has no class for has the guidance and scheduler of the one it has, and the strength of
        Stable Diffusion's class.
        """
        name = "mask" if mask else "image" if image else "text"
        if name in self.modes:
            return self.modes[name]
        known = next(iter(self.modes.values()), ModeFacts("StableDiffusionPipeline"))
        return dataclasses.replace(known, strength=0.8 if name == "image" else 1.0)


@dataclass(frozen=True)
class GuidanceRole:
    """How the prompt is followed. What one image asks for is `runtimes.pipeline.guidance.Guidance`.

    Attributes:
        combination: "cfg" is negative + scale * (positive - negative), Ho & Salimans, arXiv 2207.12598; "none" where
            there is no second branch.
        guides_below_one: every scale but 1 guides; by most pipelines, those above 1 alone.
        branches: order of the rows of one call.
    """

    combination: str = "cfg"
    guides_below_one: bool = False
    branches: tuple[str, ...] = (NEGATIVE, POSITIVE)

    def __post_init__(self) -> None:
        """Refuse what no loop here computes."""
        _one_of(self.combination, ("cfg", "none"), "the combination of branches")
        if sorted(self.branches) != [NEGATIVE, POSITIVE]:
            raise InputError(f"the branches are {NEGATIVE} and {POSITIVE} in either order, found {self.branches}")


@dataclass(frozen=True)
class Roles:
    """What must be known of a pipeline besides its networks' bytes.

    Attributes:
        safety_checker: component that judges images; "" in a bundle without.
    """

    denoiser: Denoiser
    codec: Codec
    conditioner: Conditioner = field(default_factory=Conditioner)
    process: Process = field(default_factory=Process)
    guidance: GuidanceRole = field(default_factory=GuidanceRole)
    safety_checker: str = ""

    @property
    def encoders(self) -> tuple[str, ...]:
        """Components that read the prompt, in order."""
        return tuple(encoder.component for encoder in self.conditioner.encoders)

    @property
    def generates_with(self) -> tuple[str, ...]:
        """Components without which no image can be generated from noise."""
        return (*self.encoders, self.denoiser.component, self.codec.decoder.component)

    def role(self, component: str) -> Role:
        """What a component of the bundle is for."""
        known = {self.denoiser.component: Role.DENOISER, self.codec.encoder.component: Role.IMAGE_ENCODER,
                 self.codec.decoder.component: Role.IMAGE_DECODER}
        known |= dict.fromkeys(self.encoders, Role.TEXT_ENCODER)
        known |= {entry.component: Role.SHALLOW for entry in self.denoiser.entries.values()}
        known |= {self.safety_checker: Role.SAFETY_CHECKER} if self.safety_checker else {}
        return known.get(component, Role.OTHER)

    def adapter(self, component: str) -> str:
        """What adapters' files call a component; "" for one that none changes."""
        if self.role(component) in (Role.DENOISER, Role.SHALLOW):
            return self.denoiser.adapter
        reader = self.text_encoder(component)
        return "" if reader is None else reader.adapter

    def adapted(self, adapter: str) -> str:
        """The component that adapters' files call so; "" if there is none."""
        named = {self.denoiser.adapter: self.denoiser.component}
        named |= {e.adapter: e.component for e in self.conditioner.encoders}
        return named.get(adapter, "") if adapter else ""

    def text_encoder(self, component: str) -> TextEncoder | None:
        """The text encoder of that component, None if it is none."""
        return next((e for e in self.conditioner.encoders if e.component == component), None)

    def sized(self, height: int, width: int) -> Roles:
        """The same with another default size in pixels."""
        return dataclasses.replace(self, codec=dataclasses.replace(self.codec, height=height, width=width))

    def mode(self, image: bool, mask: bool) -> ModeFacts:
        """What is generated by default; see `Process.mode`."""
        return self.process.mode(image, mask)


def check_roles(roles: Roles, components: Mapping[str, Described]) -> None:
    """Refuse roles that name an input or output which their component does not have.

    Args:
        roles: of a pipeline.
        components: of it, as far as they are there: one that is missing is refused by whoever opens it.

    Raises:
        InputError: names the component and what it lacks.
    """
    denoiser, condition = roles.denoiser, roles.conditioner
    fed = [denoiser.sample, denoiser.timestep, condition.context, condition.pooled, *condition.numbers]
    wanted: list[tuple[str, list[str], list[str]]] = [(denoiser.component, fed, [denoiser.output])]
    for entry in denoiser.entries.values():
        wanted += [(denoiser.component, [], list(entry.features)),
                   (entry.component, [*fed, *entry.features], [denoiser.output])]
    wanted += [(half.component, [half.input], [half.output]) for half in (roles.codec.encoder, roles.codec.decoder)]
    wanted += [(e.component, [e.ids], [e.hidden, e.pooled]) for e in condition.encoders]
    for name, inputs, outputs in wanted:
        if name not in components:
            continue
        for what, names, specs in (("input", inputs, components[name].inputs),
                                   ("output", outputs, components[name].outputs)):
            if missing := sorted({n for n in names if n} - {spec.name for spec in specs}):
                raise InputError(f"{name} has no {what} {', '.join(missing)}, which its role names")


def _one_of(value: str, known: tuple[str, ...], what: str) -> None:
    if value not in known:
        raise InputError(f"{what} is {value!r:.40}, this version knows {', '.join(known)}", fix="upgrade ldm-deploy")


def _at_least(value: int, what: str) -> None:
    if value < 1:
        raise InputError(f"{what} is {value}, expected a number from 1 on")
