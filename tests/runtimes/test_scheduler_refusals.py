"""What the samplers refuse, each by name and with a way out; and that importing them brings in numpy alone."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.cli.generate import request_options
from runtimes.errors import InputError
from tests.runtimes.scheduler_reference import SCHEDULERS, base_config, from_config, keys_of, normal

NOISE = {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}


@pytest.mark.parametrize("name", ["euler-ancestral", "lcm"])
def test_a_stochastic_step_without_noise_is_refused_not_generated(name):
    run = from_config(base_config(name)).start(4)
    assert [run.needs_noise(i) for i in range(4)] == [True, True, True, False]
    with pytest.raises(ValueError, match="noise"):
        run.step(normal("o"), 0, normal("s"))


MEMORY = ["dpm++", "dpm-single", "dpm-sde", "deis", "unipc", "sa-solver", "pndm", "lms", "heun", "kdpm2", "edm-dpm++"]


@pytest.mark.parametrize("name", MEMORY)
def test_a_skipped_step_of_a_method_with_memory_is_refused(name):
    run = from_config(base_config(name)).start(4)
    with pytest.raises(ValueError, match="step 1 taken after 0 steps"):
        run.step(normal("o"), 1, normal("s"), normal("n"))


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize(
    ("arguments", "where"),
    [
        ({"steps": 0}, "steps"),
        ({"steps": -3}, "steps"),
        ({"steps": 1001}, "steps"),
        ({"steps": 2.5}, "steps"),
        ({"steps": float("nan")}, "steps"),
        ({"steps": 10, "strength": 0.0}, "strength"),
        ({"steps": 10, "strength": 1.01}, "strength"),
        ({"steps": 10, "strength": float("nan")}, "strength"),
        ({"steps": 10, "strength": 0.05}, "strength"),
        ({"steps": 10, "eta": -0.1}, "eta"),
        ({"steps": 10, "eta": float("nan")}, "eta"),
    ],
    ids=str,
)
def test_bad_run_arguments_are_refused_with_a_way_out(name, arguments, where):
    with pytest.raises(InputError) as caught:
        from_config(base_config(name)).start(**arguments)
    assert caught.value.where == where and caught.value.fix


def test_the_strength_that_an_error_recommends_is_accepted():
    scheduler = from_config(base_config("ddim"))
    for steps in range(1, 150):
        if int(steps * 0.01) < 1:
            with pytest.raises(InputError) as caught:
                scheduler.start(steps, 0.001)
            assert scheduler.start(steps, float(caught.value.fix.split()[-1])).timesteps.size >= 1


@pytest.mark.parametrize("name", sorted(set(SCHEDULERS) - {"ddim", "tcd"}))
def test_eta_is_read_by_ddim_and_tcd_alone(name):
    with pytest.raises(InputError, match="ddim"):
        from_config(base_config(name)).start(10, eta=0.5)


@pytest.mark.parametrize(
    ("name", "options", "named"),
    [
        ("dpm++", {"algorithm_type": "dpmsolver"}, "final_sigmas_type"),
        ("dpm++", {"algorithm_type": "rk45"}, "algorithm_type"),
        ("dpm++", {"use_flow_sigmas": True}, "use_flow_sigmas"),
        ("dpm++", {"variance_type": "learned"}, "variance_type"),
        ("dpm++", {"solver_order": 0}, "solver_order"),
        ("dpm++", {"prediction_type": "flow_prediction"}, "prediction_type"),
        ("dpm++", {"use_karras_sigmas": True, "use_beta_sigmas": True}, "only one of"),
        ("dpm++", {"thresholding": True, "dynamic_thresholding_ratio": 1.5}, "dynamic_thresholding_ratio"),
        ("dpm-single", {"solver_order": 4}, "solver_order"),
        ("dpm-single", {"algorithm_type": "sde-dpmsolver", "final_sigmas_type": "sigma_min"}, "algorithm_type"),
        ("dpm-single", {**NOISE, "thresholding": True}, "thres"),
        ("dpm-sde", {"noise_sampler_seed": 0}, "noise_sampler_seed"),
        ("deis", {"use_flow_sigmas": True}, "use_flow_sigmas"),
        ("deis", {"algorithm_type": "sde-dpmsolver++"}, "algorithm_type"),
        ("unipc", {"use_flow_sigmas": True}, "use_flow_sigmas"),
        ("unipc", {"use_dynamic_shifting": True}, "use_dynamic_shifting"),
        ("unipc", {"shift_terminal": 0.1}, "shift_terminal"),
        ("unipc", {"solver_p": {"_class_name": "DDIMScheduler"}}, "solver_p"),
        ("sa-solver", {"tau_func": "constant"}, "tau_func"),
        ("sa-solver", {"corrector_order": 5}, "corrector_order"),
        ("ddpm", {"variance_type": "learned_range"}, "variance_type"),
        ("ddpm", {"variance_type": "fixed_large_log"}, "variance_type"),
        ("euler", {"interpolation_type": "cubic"}, "interpolation_type"),
        ("euler", {"timestep_type": "whole"}, "timestep_type"),
        ("euler", {"final_sigmas_type": "half"}, "final_sigmas_type"),
        ("euler-ancestral", {"prediction_type": "sample"}, "prediction_type"),
        ("kdpm2", {"prediction_type": "sample"}, "prediction_type"),
        ("pndm", {"prediction_type": "sample"}, "prediction_type"),
        ("edm-euler", {"prediction_type": "sample"}, "prediction_type"),
        ("edm-euler", {"sigma_min": 0.0}, "sigma_min"),
        ("edm-dpm++", {"sigma_schedule": "linear"}, "sigma_schedule"),
        ("ddim", {"prediction_type": None}, "prediction_type"),
        ("ddim", {"beta_schedule": "sigmoid"}, "beta_schedule"),
        ("ddim", {"timestep_spacing": "golden"}, "timestep_spacing"),
        ("ddim", {"beta_start": -0.1}, "positive"),
        ("ddim", {"beta_end": 1.5}, "between 0 and 1"),
        ("ddim", {"beta_end": float("nan")}, "beta_end"),
        ("ddim", {"beta_end": "0.02"}, "beta_end"),
        ("ddim", {"trained_betas": [0.1, 0.2]}, "1000 betas"),
        ("ddim", {"trained_betas": ["a"] * 1000}, "trained_betas"),
        ("ddim", {"num_train_timesteps": 0}, "num_train_timesteps"),
        ("ddim", {"num_train_timesteps": True}, "num_train_timesteps"),
        ("ddim", {"clip_sample": "no"}, "clip_sample"),
        ("ddim", {"trained_betas": [[0.1] * 1000]}, "trained_betas"),
        ("ddim", {"steps_offset": -1}, "steps_offset"),
    ],
    ids=str,
)
def test_an_unsupported_config_is_refused_by_name(name, options, named):
    with pytest.raises(InputError, match=named) as caught:
        from_config(base_config(name, **options))
    assert caught.value.where == "scheduler_config.json" and caught.value.fix


def test_unknown_classes_and_names_are_refused_with_the_known_ones():
    with pytest.raises(InputError, match=r"ScoreSdeVpScheduler.*EulerDiscreteScheduler"):
        from_config({"_class_name": "ScoreSdeVpScheduler"})
    with pytest.raises(InputError, match="None is unknown"):
        from_config({})
    with pytest.raises(InputError, match="ipndm") as caught:
        from_config(base_config("ddim"), "ipndm")
    assert "euler-ancestral" in caught.value.fix
    assert from_config({"_class_name": "ScoreSdeVpScheduler"}, "euler") == from_config(base_config("euler"))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_key_that_is_another_classes_is_ignored_as_diffusers_ignores_it(name):
    foreign = {"use_flow_sigmas": True, "noise_sampler_seed": 3, "solver_p": {}, "tau_func": 1, "shift_terminal": 0.1}
    kind = SCHEDULERS[name].__self__
    left = {key: value for key, value in foreign.items() if key not in kind.unsupported and key not in keys_of(name)}
    assert from_config(base_config(name, **left)) == from_config(base_config(name))


@pytest.mark.parametrize("name", ["ddim", "ddpm", "lcm", "tcd"])
def test_noise_prediction_at_zero_terminal_snr_is_refused_unless_clipped(name):
    options = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "clip_sample": False}
    with pytest.raises(InputError, match="zero signal-to-noise"):
        from_config(base_config(name, **options)).start(10)
    assert from_config(base_config(name, **options)).start(10, strength=0.5).timesteps[0] < 999
    assert from_config(base_config(name, **options, prediction_type="v_prediction")).start(10).timesteps[0] == 999
    if name != "tcd":
        assert from_config(base_config(name, **options | {"clip_sample": True})).start(10).timesteps[0] == 999


def test_schedules_that_leave_the_training_range_or_repeat_a_level_are_refused():
    with pytest.raises(InputError, match="timestep 1000, after the last one"):
        from_config(base_config("ddim", steps_offset=1)).start(1000)
    for name in ("ddim", "ddpm", "pndm", "sa-solver"):
        with pytest.raises(InputError, match="end at timestep -1"):
            from_config(base_config(name, timestep_spacing="trailing")).start(61)
    with pytest.raises(InputError, match="repeats a noise level"):
        from_config(base_config("dpm++", timestep_spacing="leading")).start(1000)
    with pytest.raises(InputError, match="at most 50"):
        from_config(base_config("lcm")).start(51)
    with pytest.raises(InputError, match="Runge-Kutta"):
        from_config(base_config("pndm", skip_prk_steps=False)).start(3)
    with pytest.raises(InputError, match="step 10 of 10 is not finite"):
        from_config(base_config("unipc", lower_order_final=False)).start(10)
    with pytest.raises(InputError, match="no third order"):
        from_config(base_config("edm-dpm++", algorithm_type="sde-dpmsolver++", solver_order=3)).start(30)


def test_the_help_of_generate_names_every_sampler():
    (text,) = (option.text for option in request_options() if option.name == "scheduler")
    assert re.split(r", | or ", text.partition("one of ")[2].partition(";")[0]) == list(SCHEDULERS)


def test_importing_the_samplers_brings_in_numpy_alone():
    heavy = ["torch", "diffusers", "transformers", "scipy", "onnxruntime", "onnx"]
    code = f"import sys, runtimes.schedulers; print([m for m in {heavy} if m in sys.modules])"
    root = Path(__file__).parents[2]
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert run.stdout.strip() == "[]"
