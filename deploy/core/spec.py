"""`BuildSpec`, what the user asks for, validated with pydantic from options or a YAML file."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field, ValidationError, field_validator, model_validator

from deploy.core.budgets import budget_for
from deploy.core.pruning_options import PruningOptions
from runtimes.bundle.tensors import ShapeRange
from runtimes.errors import InputError
from runtimes.system.text_files import read_text

REFERENCE = "reference"
Target = Literal["onnxruntime", "openvino", "tensorrt", "tensorrt-rtx", "auto"]
LOCAL_FILES = ("lora", "embedding", "vae")  # fields that name files outside the model
# Fields that a manifest holds only where they are used.
LATER_OPTIONS = ("prune_vae", "prune_candidates", "recover_batch", "smoothquant_alpha", "text_encoder_bits", "device",
                 "variant", "revision", "hoist")
ENGINE_TARGETS = ("tensorrt", "tensorrt-rtx")
INTEGERS = ("int8", "auto")  # precisions that quantize
HOW_TO_WRITE = "write options of `build` as keys with _ for -, a line each, such as `precision: fp16`"
Precision = Literal["fp32", "fp16", "bf16", "int8", "auto"]
Quantization = Literal["hybrid", "static", "dynamic", "weight-only"]
QuantizationMethod = Literal["split-skips", "smoothquant", "bias-correction"]
Verify = Literal["auto", "full", "quick", "components", "no"]
RangeEstimator = Literal["minmax", "percentile", "mse", "entropy"]


class BuildSpec(PruningOptions):
    """A whole build. Every field has the default that `build` without options uses.

    A field is an option of `build` and a key of its YAML files: its description, default and range are the option's
    help text (`deploy.cli.build_commands`). What a default of none stands for is `default_text`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    model: str = Field(
        default=REFERENCE, description="folder in diffusers layout, or OWNER/NAME on the Hugging Face Hub",
        json_schema_extra={"default_text": "the model that ships with the package"})
    variant: str = Field(default="", pattern=r"^[A-Za-z0-9_-]*$", description=(
        "variant of the weight files, such as fp16 for *.fp16.safetensors; a component without such files has its "
        "plain ones"), json_schema_extra={"default_text": "the plain files"})
    revision: str = Field(default="", description="branch, tag or commit of a MODEL on the Hub",
                          json_schema_extra={"default_text": "main"})
    target: Target = Field(default="onnxruntime", description=(
        "runtime that the bundle is for; auto: onnxruntime or openvino, whichever is faster on this machine"))
    precision: Precision = Field(default="fp32", description=(
        "number format of the networks; auto: the cheapest mixture within the accuracy budget"),
        json_schema_extra={"default_text": "fp16 for TensorRT, fp32 for others"})
    shapes: dict[str, ShapeRange] = Field(default_factory=dict, description=(
        "allowed sizes, least:usual:most, as batch=1:2:8,height=256:512:768; axes: batch in images, height and width "
        "in pixels, sequence in tokens; for TensorRT, an axis that is given again starts the next optimization profile"
        ), json_schema_extra={"default_text": "the model's own size and its family's ranges"})
    lora: tuple[str, ...] = Field(default=(), description="LoRA file, FILE or FILE:SCALE; may be given again")
    lora_mode: Literal["merge", "swap"] = Field(default="merge", description=(
        "merge the LoRAs into the weights, or make them inputs that `generate --lora` can replace"))
    embedding: tuple[str, ...] = Field(default=(), description=(
        "textual inversion file, FILE or FILE:TOKEN; may be given again"))
    vae: str = Field(default="", description="folder of an autoencoder that replaces the model's own")
    opset: int = Field(default=20, ge=20, le=24, description="ONNX opset of the exported graphs")
    # YAML reads a bare `no` as false: true and false are taken for "auto" and "no".
    verify: Verify = Field(default="auto", description=(
        "how much is compared with PyTorch; quick: 4 steps of one image, components: no images, no: nothing, which a "
        "bundle records, auto: full where that takes a minute or two, else quick"))
    budget: dict[str, float] = Field(default_factory=dict, description=(
        "another accuracy limit, NAME=NUMBER, several with commas; names: component_relative_l2, "
        "trajectory_relative_l2, image_psnr_db, image_ssim, retrieval_points"),
        json_schema_extra={"default_text": "the limits of the precision"})
    prompts: tuple[str, ...] = Field(
        default=(), description="file with the prompts of the image-level comparison, one a line",
        json_schema_extra={"default_text": "the model's own set"})
    keep: tuple[str, ...] = Field(default=(), description=(
        "pattern of node names, weights or operator types that stay in float32; may be given again"))
    quantization: Quantization = Field(default="hybrid", description="recipe of integer builds")
    text_encoder_bits: Literal[8, 4] = Field(default=8, description=(
        "bits of the text encoders' weights in integer builds; 4 has a scale for every 32 inputs"))
    quantization_methods: tuple[QuantizationMethod, ...] = Field(default=(), description=(
        "change of the graph that keeps more accuracy in 8 bits; may be given again"))
    smoothquant_alpha: float = Field(default=0.5, ge=0, le=1, description=(
        "how far the method smoothquant moves the range of activations into the weights, 0 being not at all"))
    calibration_prompts: tuple[str, ...] = Field(default=(), description=(
        "file with the prompts whose images give the ranges of activations, one a line"),
        json_schema_extra={"default_text": "the model's own set"})
    calibration_samples: int = Field(default=128, ge=1, description="denoiser calls that ranges are computed from")
    device: Literal["cpu", "cuda", "tensorrt"] = Field(default="cpu", description=(
        "ONNX Runtime's provider that the bundle is for; with --precision fp16, GPUs compute in float16, a CPU only "
        "stores weights in it"))
    cpu: Literal["auto", "vnni", "avx2"] = Field(default="auto", description=(
        "for --precision int8 or auto: processor that the bundle is for; auto: this one, vnni: one with VNNI, or any "
        "ARM, avx2: x86 without VNNI, where weights have 7 bits, lest sums of products overflow"))
    range_estimator: RangeEstimator = Field(
        default="mse", description="how the range of an activation follows from samples")
    hoist: bool = Field(default=False, description=(
        "compute whatever the sample does not decide once a prompt or schedule, not at every step"))
    step_cache: bool = Field(default=False, description=(
        "add the step cache, a second and shallow denoiser graph, for `generate --cache-interval`"))
    safety_checker: bool = Field(
        default=False, description="export the model's own safety checker, for `generate --safety`")
    profiles: tuple[dict[str, ShapeRange], ...] = Field(default=(), description=(
        "optimization profiles of TensorRT, a mapping like `shapes` each"))
    engine: dict[str, Any] = Field(default_factory=dict, description=(
        "option of TensorRT's builder, NAME=VALUE, such as capabilities=SM86+SM89, static=true or "
        "optimization_level=5; may be given again; docs/tensorrt.md lists them"),
        json_schema_extra={"default_text": "the builder's own"})

    @model_validator(mode="before")
    @classmethod
    def _default_precision(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and "precision" not in values and values.get("target") in ENGINE_TARGETS:
            return {**values, "precision": "fp16"}
        return values

    @model_validator(mode="after")
    def _everything_is_honoured(self) -> BuildSpec:
        for name, needs in NEEDS.items():
            if getattr(self, name) == type(self).model_fields[name].get_default(call_default_factory=True):
                continue
            for need in needs:
                if not need.holds(self):
                    raise ValueError(f"{name} needs {need.text}; without, it would change nothing")
        budget_for(self.precision, self.budget)
        for name in ("static", "keep_graph"):
            if not isinstance(self.engine.get(name, False), bool):
                raise ValueError(f"engine.{name} is {self.engine[name]!r}, expected true or false")
        return self

    @property
    def graph_target(self) -> str:
        """The target whose form the graphs have: those for a GPU are TensorRT's."""
        return self.target if self.device == "cpu" else "tensorrt"

    @model_validator(mode="after")
    def _on_gpus(self) -> BuildSpec:
        if self.device == "cpu":
            return self
        if self.target != "onnxruntime":
            raise ValueError(f"device {self.device} is for --target onnxruntime; others run where they are made for")
        if self.lora_mode == "swap":
            raise ValueError("lora_mode swap is for --device cpu")
        if self.precision not in ("fp32", "fp16", "bf16", *(("int8",) if self.device == "tensorrt" else ())):
            raise ValueError(f"{self.precision} is not for --device {self.device}: cuda takes fp32, fp16 and bf16, "
                             "tensorrt int8 too")
        return self

    @model_validator(mode="after")
    def _swaps(self) -> BuildSpec:
        if self.lora_mode == "swap":
            if not self.lora:
                raise ValueError("swap needs --lora: its modules are those that another LoRA may change")
            if self.target in (*ENGINE_TARGETS, "auto") or self.precision not in ("fp32", "fp16") or self.prunes or (
                    self.step_cache):
                raise ValueError("swap is for onnxruntime and openvino, fp32 and fp16, without pruning or step cache")
        return self

    @field_validator("lora", "embedding", "vae", mode="after")
    @classmethod
    def _absolute(cls, value: Any) -> Any:
        """Found again by `verify`, from wherever it is called."""
        if isinstance(value, str):
            return str(Path(value).absolute()) if value else value
        return tuple(str(Path(option).absolute()) for option in value)

    @field_validator("verify", mode="before")
    @classmethod
    def _from_yaml(cls, value: Any) -> Any:
        return {True: "auto", False: "no"}[value] if isinstance(value, bool) else value

    @field_validator("profiles", mode="before")
    @classmethod
    def _parse_profiles(cls, value: Any) -> Any:
        if isinstance(value, Sequence) and not isinstance(value, str):
            return tuple(cls._parse_shapes(profile) for profile in value)
        return value

    @field_validator("shapes", mode="before")
    @classmethod
    def _parse_shapes(cls, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(k): parse_range(str(k), v) for k, v in value.items()}
        return value

    def resolved(self) -> dict[str, Any]:
        """The JSON-able form kept in the manifest: no local folder, so that the same build has the same digest.

        Files outside the model stand with their hashes in the passes' records and among the source's weights.
        """
        # A bundle that does not use an option keeps the digest it had before there was that option.
        unused = {name for name in LATER_OPTIONS if getattr(self, name) == type(self).model_fields[name].default}
        content = self.model_dump(mode="json", exclude={"model", "shapes", "profiles", *LOCAL_FILES, *unused})
        content["shapes"] = _shown(self.shapes)
        content["profiles"] = [_shown(profile) for profile in self.profiles]
        return content


@dataclass(frozen=True)
class Need:
    """What a build must be for an option to change anything: in words of the command line, and as a test."""

    text: str
    holds: Callable[[BuildSpec], bool]


_INTEGERS = Need("--precision int8 or auto", lambda s: s.precision in INTEGERS)
_RANGES = Need("--quantization hybrid or static, which find ranges beforehand",
               lambda s: s.precision == "auto" or s.quantization in ("hybrid", "static"))
_ENGINES = Need(f"--target {' or '.join(ENGINE_TARGETS)}", lambda s: s.target in ENGINE_TARGETS)
_COMPARED = Need("a comparison, not --verify no", lambda s: s.verify != "no")
_CHANNELS = Need("--prune or --prune-vae",
                 lambda s: s.prune > 0 or bool(s.prune_candidates) or s.prune_vae > 0)
# Option -> what it needs in order to change anything; one that is given without is refused, not ignored. An option
# that is not here is used by every build. `PruningOptions` has those among the prunings' own.
NEEDS: Mapping[str, tuple[Need, ...]] = {
    "profiles": (_ENGINES,),
    "engine": (_ENGINES,),
    "keep": (Need("--precision fp16, bf16, int8 or auto", lambda s: s.precision != "fp32"),),
    "quantization": (_INTEGERS,),
    "text_encoder_bits": (_INTEGERS,),
    "quantization_methods": (_INTEGERS, _RANGES),
    "smoothquant_alpha": (Need("--quantization-methods smoothquant",
                               lambda s: "smoothquant" in s.quantization_methods),),
    "calibration_prompts": (_INTEGERS, _RANGES),
    "calibration_samples": (_INTEGERS, _RANGES),
    "range_estimator": (_INTEGERS, _RANGES),
    "cpu": (_INTEGERS, Need("a target that runs on CPUs", lambda s: s.target not in ENGINE_TARGETS)),
    "budget": (Need("a comparison, not --verify no", lambda s: s.verify != "no" or s.precision in INTEGERS),),
    "prompts": (Need("a comparison, not --verify no", lambda s: s.verify != "no" or s.precision == "auto"),),
    "prune_candidates": (_COMPARED,),
    "prune_method": (_CHANNELS,),
    "prune_widths": (Need("--prune", lambda s: s.prune > 0 or bool(s.prune_candidates)),),
    "recover_batch": (Need("--recover of the U-Net", lambda s: s.recover > 0 and s.prunes_denoiser),),
}


def parse_range(name: str, value: Any) -> ShapeRange:
    """Read `min:opt:max`, a single number (all three), or a ShapeRange.

    Raises:
        InputError: not numbers, or not in order.
    """
    if isinstance(value, ShapeRange):
        return value
    parts = str(value).split(":")
    if len(parts) not in (1, 3) or not all(p.strip().isdigit() for p in parts):
        raise InputError(f"{value!r} is not a range", where=f"--shapes {name}", fix=f"write {name}=min:opt:max")
    low, middle, high = (int(p) for p in (parts * 3)[:3])
    return ShapeRange(low, middle, high)


def parse_shapes(options: Sequence[str]) -> list[dict[str, ShapeRange]]:
    """Read `batch=1:2:8,height=...` options, each possibly holding several axes; an axis that is given again starts the
    next optimization profile.

    Raises:
        InputError: a part without `=`, or not a range.
    """
    profiles: list[dict[str, ShapeRange]] = [{}]
    for part in (p.strip() for option in options for p in option.split(",")):
        name, equals, value = part.partition("=")
        if not equals:
            raise InputError(f"{part!r} is not axis=min:opt:max", where="--shapes", fix="write batch=1:2:8,height=...")
        if name in profiles[-1]:
            profiles.append({})
        profiles[-1][name] = parse_range(name, value)
    return profiles


def covering(profiles: Sequence[Mapping[str, ShapeRange]]) -> dict[str, ShapeRange]:
    """The ranges that hold every profile; the first one says what is most common."""
    shapes: dict[str, ShapeRange] = {}
    for name in dict.fromkeys(axis for profile in profiles for axis in profile):
        ranges = [profile[name] for profile in profiles if name in profile]
        shapes[name] = ShapeRange(min(r.min for r in ranges), ranges[0].opt, max(r.max for r in ranges))
    return shapes


def read_shapes(options: Sequence[str]) -> dict[str, Any]:
    """`--shapes` as fields of `BuildSpec`: the ranges, and the profiles where there are several.

    Raises:
        InputError: as `parse_shapes`.
    """
    profiles = parse_shapes(options)
    return {"shapes": covering(profiles)} | ({"profiles": profiles} if len(profiles) > 1 else {})


def parse_engine(options: Sequence[str]) -> dict[str, Any]:
    """Read `name=value` options of the engine builder; values are YAML scalars.

    Raises:
        InputError: no `=`, or a value that YAML cannot read.
    """
    import yaml

    engine: dict[str, Any] = {}
    for option in options:
        name, equals, value = option.partition("=")
        if not equals:
            raise InputError(f"{option!r} is not name=value", where="--engine", fix="write optimization_level=5")
        try:
            engine[name.strip()] = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError) as error:  # ValueError: a date such as 2020-99-99
            raise InputError(f"{option!r}: its value is not YAML", where="--engine", fix="write optimization_level=5"
                             ) from error
    return engine


def _shown(shapes: Mapping[str, ShapeRange]) -> dict[str, str]:
    return {k: f"{r.min}:{r.opt}:{r.max}" for k, r in sorted(shapes.items())}


def make_spec(options: Mapping[str, Any], file: Path | None = None) -> BuildSpec:
    """Merge a YAML file with options given on the command line, which win.

    Raises:
        InputError: unreadable YAML, an unknown key (with the nearest known one), or a value that does not fit.
    """
    content: dict[str, Any] = {}
    where = "build options"
    if file is not None:
        content, where = _read_yaml(file), str(file)
    content.update(options)
    unknown = sorted(set(content) - set(BuildSpec.model_fields))
    if unknown:
        near = difflib.get_close_matches(unknown[0], BuildSpec.model_fields, n=1)
        raise InputError(f"unknown key {unknown[0]!r}", where=where,
                         fix=f"did you mean {near[0]}?" if near else f"known: {', '.join(BuildSpec.model_fields)}")
    try:
        return BuildSpec(**content)
    except ValidationError as error:
        first = error.errors()[0]
        # pydantic prefixes what our own validators say, which name the options that do not fit together.
        said = str(first.get("ctx", {}).get("error", first["msg"]))
        place = ".".join(str(p) for p in first["loc"])
        if place:
            said = f"{place}: {said}, got {first['input']!r:.60}"
        raise InputError(said, where=where) from error


def _read_yaml(file: Path) -> dict[str, Any]:
    import yaml

    text = read_text(file)
    try:
        content = yaml.safe_load(text)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise InputError(f"cannot read the spec: {' '.join(str(error).split())}", where=str(file),
                         fix=HOW_TO_WRITE) from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise InputError("a spec is a mapping of build options", where=str(file), fix=HOW_TO_WRITE)
    return content


def parse_budget(options: Sequence[str]) -> dict[str, float]:
    """Read `name=number` options.

    Raises:
        InputError: no `=`, or not a number.
    """
    budget: dict[str, float] = {}
    for part in (p.strip() for option in options for p in option.split(",")):
        name, _, value = part.partition("=")
        try:
            budget[name] = float(value)
        except ValueError:
            raise InputError(f"{part!r} is not name=number", where="--budget", fix="write image_psnr_db=40") from None
    return budget


def parse_numbers(text: str, where: str) -> tuple[int, ...]:
    """Read `1,2,4`.

    Raises:
        InputError: not whole numbers.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() for part in parts):
        raise InputError(f"{text!r} is not a list of whole numbers", where=where, fix="write 1,2,4")
    return tuple(int(part) for part in parts)
