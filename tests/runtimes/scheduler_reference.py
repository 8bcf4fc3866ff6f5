"""Our samplers beside diffusers': the same stand-in for a U-Net, the same noise, one run of each; no tests here."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import itertools
import sys
import types
import zlib
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from runtimes import schedulers
from runtimes.schedulers import CLASS_NAMES, method_of

# Any: the tests look at what the concrete samplers hold, which the protocol does not promise.
from_config: Any = schedulers.from_config
SCHEDULERS: Any = schedulers.SCHEDULERS

SHAPE = (2, 4, 4, 3)
TOLERANCE = 1e-5
SPACINGS = ("linspace", "leading", "trailing")
SIGMAS: dict[str, dict[str, Any]] = {
    "own": {},
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "beta": {"use_beta_sigmas": True},
    "lu": {"use_lu_lambdas": True},
}
SCHEDULES: dict[str, dict[str, Any]] = {
    "linear": {"beta_schedule": "linear"},
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "squaredcos_cap_v2": {"beta_schedule": "squaredcos_cap_v2"},
}

# Where diffusers 0.42.1 goes wrong, file and line of it, and what ours does.
KNOWN_FAULTS = {
    "trailing schedules one timestep too long": (
        "scheduling_ddim.py:375 (DDPM, PNDM, SA-Solver alike): arange(T, 0, -T / steps) has one element more for 29 "
        "of the step counts up to 500 (61, 103, 121, ...), and timestep -1 reads alphas_cumprod[-1], the noisiest. "
        "Refused. Methods that interpolate noise levels take it as timestep 0, there and here."
    ),
    "third-order sde-dpmsolver++": (
        "scheduling_dpmsolver_multistep.py:1139 (singlestep alike): the coefficient of D2 tends to -1, not to 0, with "
        "the length of the step. Here as there."
    ),
    "image to image by LMS": (
        "scheduling_lms_discrete.py:606: the first steps integrate a polynomial through slopes that were never taken, "
        "and leave their share out. Here as there."
    ),
    "noise_sampler_seed of DPMSolverSDE": (
        "scheduling_dpmsolver_sde.py:65: noise is torchsde's, from a seed that no generator decides. Here it comes "
        "from the caller, and a seed in the config is refused."
    ),
    "standard deviations from a negative rounding error": (
        "scheduling_euler_ancestral_discrete.py:448 (KDPM2 ancestral alike): sigma_down is the root of a difference "
        "that may round below 0, and the sample NaN. Here 0."
    ),
    "a last step of no length": (
        "scheduling_dpmsolver_multistep.py:1112: with Karras' sigmas and final_sigmas_type sigma_min the last two "
        "levels may be one, and order 2 (heun) and 3 divide by their distance: NaN. Here the step changes nothing."
    ),
}


def _torchsde_class(name: str) -> Any:
    """diffusers' class as it stands, where torchsde, whose noise is replaced here, need not be installed."""
    if "torchsde" not in sys.modules:
        sys.modules["torchsde"] = types.ModuleType("torchsde")
    return getattr(importlib.import_module("diffusers.schedulers.scheduling_dpmsolver_sde"), name)


CLASSES = {
    name: _torchsde_class(cls) if name == "dpm-sde" else getattr(diffusers, cls) for cls, name in CLASS_NAMES.items()
}


def keys_of(name):
    """The keys that our method reads."""
    kind = SCHEDULERS[name].__self__
    return {field.name for field in dataclasses.fields(kind)} - kind.foreign


def cells(name):
    """Every (prediction, spacing, sigmas) that the method can be asked for."""
    known = keys_of(name)
    spacings = SPACINGS if "timestep_spacing" in known else ("own",)
    spreads = [spread for spread, option in SIGMAS.items() if set(option) <= known]
    predictions = [p for p in SCHEDULERS[name].__self__.predictions if p != "original_sample"]
    return list(itertools.product(predictions, spacings, spreads))


def cell_config(name, prediction, spacing, spread, **options):
    """The config of a cell, over Stable Diffusion's betas."""
    spaced = {} if spacing == "own" else {"timestep_spacing": spacing}
    given = {"prediction_type": prediction, "clip_sample": False, **spaced, **SIGMAS[spread], **options}
    return base_config(name, **SCHEDULES["scaled_linear"], **given)


@contextlib.contextmanager
def correct_rounding():
    """torch's roots, powers, logarithms and exponentials of float32, each correctly rounded.

    MKL's roots are off by one bit in a fifth of cases on AMD (exact elsewhere), logarithms in a twentieth. Some methods
    turn this bit into more than the tolerance, and most find all of their difference in it.
    """
    exact, power = {}, torch.Tensor.__pow__
    for name in ("sqrt", "log", "exp", "expm1"):
        plain = getattr(torch.Tensor, name)
        exact[name] = lambda tensor, plain=plain: plain(tensor.double()).to(tensor.dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "__pow__", lambda x, e: power(x.double(), e).to(x.dtype))
        for name, function in exact.items():
            patch.setattr(torch.Tensor, name, function)
            patch.setattr(torch, name, function)
        yield


class ReferenceNotFinite(Exception):
    """Ours is finite up to a step after which diffusers' sample is not."""


class BrownianPath:
    """A Brownian path in sigma, sampled downwards from normal increments: diffusers' noise sampler, another tree."""

    def __init__(self, generate) -> None:
        self.generate = generate
        self.values: dict[float, Any] = {}

    def __call__(self, sigma: torch.Tensor, sigma_next: torch.Tensor) -> torch.Tensor:
        start, end, fresh = float(sigma), float(sigma_next), self.generate().astype(np.float64)
        if not self.values:
            self.values[start] = np.zeros_like(fresh)
        lowest = min(self.values)
        known = min(self.values, key=lambda place: abs(place - start))
        self.values[end] = self.values[lowest] + np.sqrt(lowest - end) * fresh
        return torch.from_numpy((self.values[end] - self.values[known]) / np.sqrt(known - end)).float()


def normal(*key):
    """The same standard-normal array for the same key, in whatever order it is asked for."""
    return np.random.default_rng(zlib.crc32(repr(key).encode())).standard_normal(SHAPE).astype(np.float32)


def model(sample, t):
    """Stands in for a U-Net: smooth, bounded, mixing neighbours, and different at every pixel and timestep."""
    place = np.arange(sample.size, dtype=np.float32).reshape(sample.shape)
    wave = np.sin(0.7 * place + np.float32(float(t)) / 150)
    return (0.6 * np.tanh(sample) + 0.2 * np.tanh(np.roll(sample, 1, -1)) + 0.3 * wave).astype(np.float32)


def base_config(name, **options):
    if name == "pndm":
        options.setdefault("skip_prk_steps", True)
    return {"_class_name": CLASSES[name].__name__, "num_train_timesteps": 1000, **options}


def our_trajectory(run, sample):
    samples = [sample]
    for i, t in enumerate(run.timesteps):
        noise = normal("step", i) if run.needs_noise(i) else None
        samples.append(run.step(model(run.scale_model_input(samples[-1], i), t), i, samples[-1], noise))
        assert samples[-1].dtype == np.float32
    return samples


def their_trajectory(scheduler, timesteps, sample, eta=0.0):
    samples, module = [sample], sys.modules[type(scheduler).__module__]
    if hasattr(scheduler, "noise_sampler"):
        calls = itertools.count()
        scheduler.noise_sampler = BrownianPath(lambda: normal("step", next(calls)))
    with pytest.MonkeyPatch.context() as patch:
        for i, t in enumerate(timesteps):
            fresh = torch.from_numpy(normal("step", i))
            if hasattr(module, "randn_tensor"):
                patch.setattr(module, "randn_tensor", lambda *_, noise=fresh, **__: noise)
            latent = torch.from_numpy(samples[-1])
            output = torch.from_numpy(model(scheduler.scale_model_input(latent, t).numpy(), t))
            # as prepare_extra_step_kwargs: whoever takes an eta is given the pipeline's, 0 by default
            extra = {"eta": eta} if type(scheduler).__name__ in ("DDIMScheduler", "TCDScheduler") else {}
            samples.append(scheduler.step(output, t, latent, return_dict=False, **extra)[0].numpy())
    return samples


def relative_l2(ours, theirs, what):
    """The worst of all steps, each against the norm of diffusers' sample."""
    assert len(ours) == len(theirs), what
    worst = 0.0
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if not np.all(np.isfinite(b)):
            raise ReferenceNotFinite(f"{what}: diffusers itself is not finite at step {i}")
        assert np.all(np.isfinite(a)), f"{what}: not finite at step {i}"
        worst = max(worst, float(np.linalg.norm((a - b).ravel()) / np.linalg.norm(b.ravel())))
    return worst


# Classes that set 1000 timesteps, slowly, when they are made: left out, since a run sets its own.
SLOW = ("heun", "kdpm2", "kdpm2-ancestral", "dpm-sde", "lms")


def make_theirs(name, config):
    """diffusers' scheduler, before its timesteps are set."""
    with pytest.MonkeyPatch.context() as patch:
        if name in SLOW:
            patch.setattr(CLASSES[name], "set_timesteps", lambda self, *_: setattr(self, "sigmas", torch.zeros(1)))
        return CLASSES[name].from_config(config)


def start_theirs(config, steps, strength=1.0, name=None):
    """diffusers' scheduler and its timesteps, set up as StableDiffusion(Img2Img)Pipeline does."""
    name = name or method_of(config)
    theirs = make_theirs(name, config)
    theirs.set_timesteps(steps)
    skipped = max(steps - min(int(steps * strength), steps), 0) * theirs.order
    timesteps = theirs.timesteps[skipped:]
    if hasattr(theirs, "set_begin_index"):
        theirs.set_begin_index(skipped)
    return theirs, timesteps


def compare(config, steps, strength=1.0, eta=0.0, name=None, tolerance=TOLERANCE):
    """Run both, from noise or from an image; the worst relative L2 of a step, which must be within `tolerance`."""
    what = f"{name or method_of(config)} {config} steps={steps} strength={strength} eta={eta}"
    run = from_config(config, name).start(steps, strength, eta)
    theirs, timesteps = start_theirs(config, steps, strength, name)
    if not bool(torch.all(torch.isfinite(timesteps))):
        raise ReferenceNotFinite(f"{what}: diffusers' timesteps are not finite")
    told = timesteps.numpy().astype(run.timesteps.dtype)
    # fractional timesteps come from diffusers' float32 logarithms and may differ in their last bits
    slack = {"rtol": 0, "atol": 0} if run.timesteps.dtype == np.int64 else {"rtol": 1e-6, "atol": 2e-3}
    np.testing.assert_allclose(run.timesteps, told, **slack, err_msg=what)
    assert run.init_noise_sigma == pytest.approx(float(theirs.init_noise_sigma), rel=1e-6), what
    noise, image = normal("initial"), normal("image")
    worst = 0.0
    if strength < 1:
        start = theirs.add_noise(*map(torch.from_numpy, (image, noise)), timesteps[:1].repeat(SHAPE[0])).numpy()
        worst = relative_l2([run.add_noise(image, noise)], [start], what + " add_noise")
    else:
        start = noise * np.float32(run.init_noise_sigma)
    worst = max(worst, relative_l2(our_trajectory(run, start), their_trajectory(theirs, timesteps, start, eta), what))
    assert worst <= tolerance, f"{what}: {worst:.1e}"
    return worst
