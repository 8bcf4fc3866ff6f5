"""Makes an autoencoder narrower, and trains its halves on images that the model generates: no data is needed.

diffusers builds encoder and decoder from one `block_out_channels`, so both halves shrink to the same widths; which
channels go is chosen in each apart. Latents and moments keep their channels: every other network fits as before.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from deploy.core.pass_cache import pipeline_identity
from deploy.pruning.planning import generates_with
from deploy.pruning.recovery.recover_network import train
from deploy.pruning.recovery.training_loop import Schedule
from deploy.pruning.shrink.importance import scorer_of
from deploy.pruning.shrink.prune_network import size_of
from deploy.pruning.shrink.structured import HALVES, prune_network
from deploy.pruning.shrink.widths import AUTOENCODER, config_of, levels_of, uniform_widths
from deploy.pruning.teacher.original import Teacher, example_feeds, load_source_module
from deploy.pruning.training_device import training_device
from exporters.source.networks import torch_component
from runtimes.bundle.details import PrunedChannels, Pruning, Recovery
from runtimes.bundle.folder import Bundle, replacing
from runtimes.bundle.manifest import digest_of, to_json
from runtimes.codec.autoencoder import unscaled
from runtimes.system.cache_root import cache_home
from runtimes.system.cache_store import use
from runtimes.system.progress import listener

ENCODER, DECODER = HALVES[AUTOENCODER]
SCORED, LEARNED, JUDGED = 32, 64, 16  # trajectories: for importance; to learn from, and others for the figures
GENERATED_AT_ONCE = 16


@dataclass(frozen=True)
class HalfRecipe(Schedule):
    """How half an autoencoder is trained.

    Attributes:
        batch: images a step.
        crop: side of what is taken of each, in latent pixels: convolutions learn nothing more from larger images.
        absolute_weight: of the mean absolute error against the squared one: it keeps edges sharp.
        variance_weight: of the moments' log-variances against their means.
    """

    learning_rate: float = 1e-3
    warmup: int = 20
    batch: int = 4
    crop: int = 32
    absolute_weight: float = 0.5
    variance_weight: float = 0.1


class HalfDistillation:
    """The task of half an autoencoder, to answer like the original half: a `recovery.training_loop.Task`.

    The decoder learns the images that the original makes of the model's latents, the encoder the moments that the
    original makes of those images. Loss: squared error in units of the original's variance, and absolute error in
    units of its deviation. Latents are mirrored at random, which costs nothing: the original answers those, too.

    Every array is float32: latents (B, C, h, w) divided by the scaling factor, pixels (B, 3, f * h, f * w) in -1..1,
    the loss a scalar. The state alone is int64, a scalar: the index of the next batch, which with the seed decides it.

    Args:
        student: the half that learns, as wrapped by `torch_component`.
        decoder, encoder: the original halves, frozen; the decoder learns without the encoder, which is then None.
        latents: (N, C, H, W) float32, divided by the scaling factor.
        recipe: size of the batches, weights of the losses, seed.
    """

    def __init__(self, student: nn.Module, decoder: nn.Module, encoder: nn.Module | None, latents: Tensor,
                 recipe: HalfRecipe) -> None:
        self.network = student
        self._decoder, self._encoder, self._latents, self._recipe = decoder, encoder, latents, recipe
        self._batches = 0

    def loss(self) -> tuple[Tensor, float]:
        """One batch: the loss, and the squared error relative to the variance of what the original answers."""
        inputs, wanted = _example(self._decoder, self._encoder, self.generated(self._batches))
        self._batches += 1
        found, recipe = self.network(inputs)[0], self._recipe
        if self._encoder is None:
            squared, absolute = _errors(found, wanted)
            return squared + recipe.absolute_weight * absolute, squared.item()
        (squared, absolute), (variance, _) = (_errors(*pair) for pair in zip(
            found.chunk(2, 1), wanted.chunk(2, 1), strict=True))
        loss = squared + recipe.absolute_weight * absolute + recipe.variance_weight * variance
        return loss, squared.item()

    def state(self) -> dict[str, Tensor]:
        """How many batches were taken: each follows from its number and the seed."""
        return {"batches": torch.tensor(self._batches)}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on with the next batch."""
        self._batches = int(tensors["batches"])

    def generated(self, batch: int) -> Tensor:
        """The latents of one batch, (batch size, C, h, w): crops of some of all, every second one mirrored."""
        generator = torch.Generator().manual_seed(self._recipe.seed * 1_000_003 + batch)
        rows = torch.randint(len(self._latents), (self._recipe.batch,), generator=generator)
        side = self._recipe.crop
        top, left = (int(torch.randint(max(size - side, 0) + 1, (), generator=generator))
                     for size in self._latents.shape[2:])
        chosen = self._latents[rows.to(self._latents.device), :, top : top + side, left : left + side]
        return torch.cat([chosen[::2], chosen[1::2].flip(3)])


def prune_half(source: Bundle, name: str, config: Mapping[str, Any]) -> tuple[Any, Pruning, Recovery | None]:
    """A narrower autoencoder of which one half was retrained.

    The halves are components of their own, each with a result of its own: of what is returned for one, the other half
    has the right shape and is not used.

    Args:
        source: a bundle in the format "safetensors" with the original autoencoder and, to generate with, U-Net and text
            encoder.
        name: of the component that is the half.
        config: of pass `prune-vae`.

    Returns:
        an AutoencoderKL, float32, and what became of the half.

    Raises:
        InputError: a ratio that its norm groups do not allow (names the level and what works), or a U-Net that
            images cannot be generated with here.
        ParityError: the loss of the recovery is not finite.
    """
    network = load_source_module(source, source.component(name))
    levels = levels_of(config_of(network), "vae")
    widths = uniform_widths(levels, config["prune"], "vae")  # refuses impossible ratios before images are generated
    count = LEARNED + JUDGED if config["steps"] else SCORED if config["method"] == "taylor" else 0
    latents = own_latents(source, config, count) if count else torch.empty(0)
    if config["method"] == "taylor":
        accumulate_cycle_gradients(network, latents[:SCORED])
    roles = source.manifest.pipeline
    feeds = {ENCODER: example_feeds(source.component(roles.codec.encoder.component)),
             DECODER: example_feeds(source.component(roles.codec.decoder.component))}
    smaller = prune_network(network, feeds, widths, scorer_of(config["method"]), "vae")
    network.requires_grad_(False)
    channels = PrunedChannels(method=config["method"], before=tuple(level.width for level in levels),
                              remaining=tuple(widths.remaining), removed=round(widths.removed, 4))
    pruning = Pruning(parameters_before=size_of(torch_component(roles.role(name), network)), channels=channels)
    recovery = _recover(source, name, network, smaller, latents, config) if config["steps"] else None
    return smaller.to("cpu"), pruning, recovery


def own_latents(source: Bundle, config: Mapping[str, Any], count: int) -> Tensor:
    """What the model generates, (count, C, H, W) float32, divided by the scaling factor; stored in the build cache.

    Args:
        source: holds U-Net, text encoder and scheduler.
        config: says with which prompts and guidance.
        count: of samples; of one seed, so that fewer are the first of more.

    Raises:
        InputError: a U-Net with other inputs than sample, timestep and text.
    """
    roles = source.manifest.pipeline
    generated_by = {name: source.component(name).sha256 for name in generates_with(source.manifest)}
    key = {"weights": generated_by, "pipeline": pipeline_identity(source.manifest), "prompts": config["prompts"],
           "guidance_scale": config["guidance_scale"], "count": count}
    file = cache_home() / "recover" / f"latents-{digest_of(to_json(key))}.safetensors"
    if not use(file):
        device = training_device()
        teacher = Teacher.load(source, roles.denoiser.component, config["prompts"], config["guidance_scale"], device)
        listener().finished(f"prune-vae: generating {count} images to learn from")
        generated = teacher.trajectories(min(count, GENERATED_AT_ONCE)).generate(count)
        with replacing(file) as partial:
            save_file({"latents": generated.cpu()}, partial)
    return torch.from_numpy(unscaled(source.manifest.pipeline.codec, load_file(file)["latents"].numpy()))


def accumulate_cycle_gradients(network: Any, latents: Tensor) -> None:
    """Leave the gradient of a reconstruction in `.grad` of every parameter of both halves.

    The reconstruction is of the decoder's own images, ||decode(mean(encode(x))) - x||^2 with x = decode(z), clipped:
    an error against its own answers would have no gradient; this one has, because no autoencoder is its own inverse.

    Args:
        network: an AutoencoderKL.
        latents: (N, C, H, W) float32, divided by the scaling factor.
    """
    encoder, decoder = (torch_component(half, network) for half in HALVES[AUTOENCODER])
    network.requires_grad_(True)
    for part in latents.split(GENERATED_AT_ONCE // 2):
        with torch.no_grad():
            image = decoder(part)[0].clamp(-1, 1)
        mean = encoder(image)[0].chunk(2, 1)[0]
        F.mse_loss(decoder(mean)[0], image).backward()


def _recover(source: Bundle, name: str, network: Any, smaller: Any, latents: Tensor,
             config: Mapping[str, Any]) -> Recovery:
    """Train one half of `smaller` in place; what the training did."""
    roles = source.manifest.pipeline
    role, device = roles.role(name), training_device()
    latents, student = latents.to(device), torch_component(role, smaller.to(device))
    decoder = torch_component(DECODER, network.to(device))
    encoder = torch_component(ENCODER, network) if role is ENCODER else None
    recipe = HalfRecipe(config["steps"])
    task = HalfDistillation(student, decoder, encoder, latents[:LEARNED], recipe)
    inputs, wanted = _example(decoder, encoder, latents[LEARNED:])
    before = _relative_l2(student, inputs, wanted)
    read = {part: source.component(part).sha256 for part in (name, *generates_with(source.manifest))}
    train(task, recipe, {"weights": read, "half": name, "config": to_json(config),
                         "pipeline": pipeline_identity(source.manifest)})
    return Recovery(steps=recipe.steps, device=device, relative_l2_before=round(before, 5),
                    relative_l2_after=round(_relative_l2(student, inputs, wanted), 5))


@torch.no_grad()
def _example(decoder: nn.Module, encoder: nn.Module | None, latents: Tensor) -> tuple[Tensor, Tensor]:
    """A half's input and the original's output for it: latents and image, or image and moments."""
    image = decoder(latents)[0]
    if encoder is None:
        return latents, image
    clipped = image.clamp(-1, 1)  # as every image that is encoded later
    return clipped, encoder(clipped)[0]


def _errors(found: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Mean squared and mean absolute error, in units of the wanted values' variance and deviation."""
    return F.mse_loss(found, wanted) / wanted.var(), F.l1_loss(found, wanted) / wanted.std()


@torch.no_grad()
def _relative_l2(half: nn.Module, inputs: Tensor, wanted: Tensor) -> float:
    """||half - original|| / ||original|| over the whole output."""
    return float((half(inputs)[0] - wanted).norm() / wanted.norm())
