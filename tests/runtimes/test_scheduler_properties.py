"""Random configs of every class: equal to diffusers, or refused in one line for a reason on the list."""

from __future__ import annotations

import logging
import re
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runtimes.errors import InputError
from runtimes.schedulers import SCHEDULERS
from tests.runtimes.scheduler_reference import (
    CLASSES,
    TOLERANCE,
    ReferenceNotFinite,
    compare,
    correct_rounding,
    from_config,
    keys_of,
    normal,
    relative_l2,
    start_theirs,
    their_trajectory,
)

pytestmark = pytest.mark.filterwarnings("ignore:.algorithm_types:FutureWarning", "ignore:Default .tensor.__array_wrap")

# Values of every key that any of the classes reads, the usual ones more often.
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "num_train_timesteps": st.sampled_from([1000, 1000, 1000, 400]),
    "beta_start": st.sampled_from([0.00085, 0.0001, 0.001]),
    "beta_end": st.sampled_from([0.012, 0.02, 0.014]),
    "beta_schedule": st.sampled_from(["scaled_linear", "scaled_linear", "linear", "squaredcos_cap_v2"]),
    "prediction_type": st.sampled_from(["epsilon", "v_prediction", "sample"]),
    "timestep_spacing": st.sampled_from(["linspace", "leading", "trailing"]),
    "steps_offset": st.sampled_from([0, 1]),
    "rescale_betas_zero_snr": st.booleans(),
    "final_sigmas_type": st.sampled_from(["zero", "sigma_min"]),
    "interpolation_type": st.sampled_from(["linear", "log_linear"]),
    "timestep_type": st.sampled_from(["discrete", "continuous"]),
    "clip_sample": st.sampled_from([True, False, None]),
    "clip_sample_range": st.sampled_from([1.0, 2.5]),
    "thresholding": st.booleans(),
    "dynamic_thresholding_ratio": st.sampled_from([0.995, 0.7]),
    "sample_max_value": st.sampled_from([1.0, 3.0]),
    "variance_type": st.sampled_from(["fixed_small", "fixed_large", "fixed_small_log"]),
    "set_alpha_to_one": st.booleans(),
    "skip_prk_steps": st.booleans(),
    "sigma_min": st.sampled_from([None, 0.05]),
    "sigma_max": st.sampled_from([None, 10.0]),
    "sigma_data": st.sampled_from([0.5, 1.0]),
    "sigma_schedule": st.sampled_from(["karras", "exponential"]),
    "rho": st.sampled_from([7.0, 3.0]),
    "solver_order": st.sampled_from([1, 2, 2, 3]),
    "predictor_order": st.sampled_from([1, 2, 3]),
    "corrector_order": st.sampled_from([1, 2, 3]),
    "solver_type": st.sampled_from(["midpoint", "heun", "logrho", "bh1", "bh2"]),
    "lower_order_final": st.booleans(),
    "euler_at_final": st.booleans(),
    "use_lu_lambdas": st.booleans(),
    "lambda_min_clipped": st.sampled_from([-float("inf"), -5.1]),
    "predict_x0": st.booleans(),
    "disable_corrector": st.sampled_from([[], [0, 2]]),
    "original_inference_steps": st.sampled_from([50, 100]),
    "timestep_scaling": st.sampled_from([10.0, 1.0]),
}
ALGORITHMS = {
    "dpm++": ("dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver"),
    "dpm-single": ("dpmsolver++", "sde-dpmsolver++", "dpmsolver"),
    "edm-dpm++": ("dpmsolver++", "sde-dpmsolver++"),
    "deis": ("deis",),
    "sa-solver": ("data_prediction", "noise_prediction"),
}
SPREADS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
# Why ours refuses what diffusers runs with a finite result.
REASONS = (
    r"steps of trailing spacing end at timestep -1",  # see KNOWN_FAULTS
    r"strength .* leaves none",  # an image-to-image run without a step
)


@st.composite
def runs(generate, name):
    """A config of the class, and the arguments of a run."""
    config = {"_class_name": CLASSES[name].__name__}
    for key in sorted(keys_of(name) & VALUES.keys()):
        if generate(st.booleans()):
            config[key] = generate(VALUES[key])
    if name in ALGORITHMS:
        config["algorithm_type"] = generate(st.sampled_from(ALGORITHMS[name]))
    if SPREADS[0] in keys_of(name):
        spread = generate(st.sampled_from([None, *SPREADS]))
        config |= {} if spread is None else {spread: True}
    if config.get("prediction_type") == "sample" and name in ("euler-ancestral", "kdpm2", "kdpm2-ancestral", "dpm-sde",
                                                              "pndm", "edm-euler", "edm-dpm++"):
        config["prediction_type"] = "v_prediction"  # which diffusers' class refuses too
    steps = generate(st.one_of(st.integers(1, 12), st.integers(13, 60)))
    eta = generate(st.sampled_from([0.0, 0.0, 0.5])) if name in ("ddim", "tcd") else 0.0
    return config, steps, generate(st.sampled_from([1.0, 1.0, 0.75, 0.4])), eta


def sensitivity(config, steps, strength, eta):
    """How far diffusers' own run moves when its noise changes by one unit in the last place."""
    theirs = [start_theirs(config, steps, strength) for _ in range(2)]
    start = normal("initial") * np.float32(float(theirs[0][0].init_noise_sigma))
    moved = start * np.float32(1 + 2**-23)
    one, other = (their_trajectory(pair[0], pair[1], x, eta) for pair, x in zip(theirs, (start, moved), strict=True))
    return relative_l2(one, other, "diffusers beside itself")


def diffusers_runs(config, steps, strength, eta):
    """Whether diffusers' run ends, with a finite result."""
    try:
        theirs, timesteps = start_theirs(config, steps, strength)
        start = normal("initial") * np.float32(float(theirs.init_noise_sigma))
        end = their_trajectory(theirs, timesteps, start, eta)[-1]
    except Exception:  # whatever it trips over
        return False
    return bool(len(timesteps)) and bool(np.all(np.isfinite(end)))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_random_config_is_equal_to_diffusers_or_refused_as_diffusers_refuses(name, caplog):
    caplog.set_level(logging.CRITICAL, logger="diffusers")
    diffusers.utils.logging.disable_propagation()

    @settings(max_examples=40, derandomize=True, deadline=None, database=None,
              suppress_health_check=list(HealthCheck))
    @given(runs(name))
    def check(run):
        config, steps, strength, eta = run
        try:
            error = compare(config, steps, strength, eta, tolerance=float("inf"))
        except InputError as refusal:
            listed = any(re.search(reason, str(refusal)) for reason in REASONS)
            assert listed or not diffusers_runs(config, steps, strength, eta), f"{refusal}: {run}"
            return
        except ReferenceNotFinite:
            return
        if error > TOLERANCE:  # some solvers magnify rounding: then diffusers differs from itself as much
            assert error <= 30 * sensitivity(config, steps, strength, eta), f"{error:.1e}: {run}"

    with correct_rounding(), torch.inference_mode():
        check()


def test_the_property_can_fail(monkeypatch):
    """A wrong beta is found."""
    config = {"_class_name": "DDIMScheduler", "beta_end": 0.02}
    honest = from_config(config)
    monkeypatch.setattr("tests.runtimes.scheduler_reference.from_config",
                        lambda *_: type(honest).from_config({**config, "beta_end": 0.020001}))
    with pytest.raises(AssertionError):
        compare(config, 10)
