"""What the samplers refuse, each by name and with a way out; and that importing them brings in numpy alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from runtimes.errors import InputError
from runtimes.schedulers import SCHEDULERS, sigmas
from tests.runtimes.test_schedulers import base_config, from_config, normal


@pytest.mark.parametrize("name", ["euler-ancestral", "lcm"])
def test_a_stochastic_step_without_noise_is_refused_not_drawn(name):
    run = from_config(base_config(name)).start(4)
    assert [run.needs_noise(i) for i in range(4)] == [True, True, True, False]
    with pytest.raises(ValueError, match="noise"):
        run.step(normal("o"), 0, normal("s"))


@pytest.mark.parametrize("name", ["dpm++", "unipc", "pndm"])
def test_a_skipped_step_of_a_method_with_memory_is_refused(name):
    run = from_config(base_config(name)).start(4)
    with pytest.raises(ValueError, match="step 1 taken after 0 steps"):
        run.step(normal("o"), 1, normal("s"))


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


@pytest.mark.parametrize("name", sorted(set(SCHEDULERS) - {"ddim"}))
def test_eta_is_ddims_alone(name):
    with pytest.raises(InputError, match="ddim"):
        from_config(base_config(name)).start(10, eta=0.5)


@pytest.mark.parametrize(
    ("name", "options", "named"),
    [
        ("ddim", {"thresholding": True}, "thresholding"),
        ("lcm", {"thresholding": True}, "thresholding"),
        ("dpm++", {"thresholding": True}, "thresholding"),
        ("unipc", {"thresholding": True}, "thresholding"),
        ("dpm++", {"algorithm_type": "dpmsolver"}, "algorithm_type"),
        ("dpm++", {"algorithm_type": "sde-dpmsolver++", "solver_order": 3}, "order 2"),
        ("dpm++", {"use_lu_lambdas": True}, "use_lu_lambdas"),
        ("dpm++", {"use_flow_sigmas": True}, "use_flow_sigmas"),
        ("dpm++", {"variance_type": "learned"}, "variance_type"),
        ("dpm++", {"solver_order": 4}, "solver_order"),
        ("dpm++", {"prediction_type": "flow_prediction"}, "prediction_type"),
        ("unipc", {"use_beta_sigmas": True}, "use_beta_sigmas"),
        ("unipc", {"predict_x0": False}, "predict_x0"),
        ("unipc", {"lower_order_final": False}, "not finite"),
        ("euler", {"use_beta_sigmas": True}, "use_beta_sigmas"),
        ("euler", {"interpolation_type": "log_linear"}, "interpolation_type"),
        ("euler", {"timestep_type": "continuous"}, "timestep_type"),
        ("euler", {"final_sigmas_type": "half"}, "final_sigmas_type"),
        ("euler-ancestral", {"prediction_type": "sample"}, "prediction_type"),
        ("pndm", {"prediction_type": "sample"}, "prediction_type"),
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
        ("ddim", {"clip_sample": None}, "clip_sample"),
        ("ddim", {"steps_offset": -1}, "steps_offset"),
    ],
    ids=str,
)
def test_an_unsupported_config_is_refused_by_name(name, options, named):
    with pytest.raises(InputError, match=named) as caught:
        from_config(base_config(name, **options))
    assert caught.value.where == "scheduler_config.json" and caught.value.fix


def test_unknown_classes_and_names_are_refused_with_the_known_ones():
    with pytest.raises(InputError, match=r"HeunDiscreteScheduler.*EulerDiscreteScheduler"):
        from_config({"_class_name": "HeunDiscreteScheduler"})
    with pytest.raises(InputError, match="None is unknown"):
        from_config({})
    with pytest.raises(InputError, match="heun") as caught:
        from_config(base_config("ddim"), "heun")
    assert "euler-ancestral" in caught.value.fix
    assert from_config({"_class_name": "HeunDiscreteScheduler"}, "euler") == from_config(base_config("euler"))


def test_noise_prediction_at_zero_terminal_snr_is_refused():
    options = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    with pytest.raises(InputError, match="zero signal-to-noise"):
        from_config(base_config("ddim", **options)).start(10)
    assert from_config(base_config("ddim", **options, prediction_type="v_prediction")).start(10).timesteps[0] == 999


def test_schedules_that_leave_the_training_range_or_repeat_a_level_are_refused():
    with pytest.raises(InputError, match="after the last training timestep"):
        from_config(base_config("ddim", steps_offset=1)).start(1000)
    with pytest.raises(InputError, match="repeat a noise level"):
        from_config(base_config("dpm++", timestep_spacing="leading")).start(1000)
    with pytest.raises(InputError, match="at most 50"):
        from_config(base_config("lcm")).start(51)
    with pytest.raises(InputError, match="skip_prk_steps"):
        from_config(base_config("pndm", skip_prk_steps=False)).start(10, strength=0.5)


def test_a_trailing_schedule_has_as_many_steps_as_asked_for():
    for steps in range(1, 1001):
        assert len(sigmas.spaced_timesteps("trailing", steps, 1000, 0)) == steps
        assert len(sigmas.multistep_timesteps("trailing", steps, 1000, 0, 1000)) == steps


def test_importing_the_samplers_brings_in_numpy_alone():
    heavy = ["torch", "diffusers", "transformers", "scipy", "onnxruntime", "onnx"]
    code = f"import sys, runtimes.schedulers; print([m for m in {heavy} if m in sys.modules])"
    root = Path(__file__).parents[2]
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert run.stdout.strip() == "[]"
