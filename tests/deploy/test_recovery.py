"""Recovery of a pruned network: what it learns from, that it learns, and that an interruption changes nothing."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from deploy.pruning.recovery import recover_network
from deploy.pruning.recovery.distill import Distillation, Recipe
from deploy.pruning.recovery.training_loop import Training
from deploy.pruning.shrink.prune_network import relative_error
from deploy.pruning.shrink.zeroed_weights import mask_two_of_four
from deploy.pruning.teacher.block_activity import Observed
from deploy.pruning.teacher.denoising_runs import Diffusion, Trajectories
from deploy.pruning.teacher.original import Teacher
from deploy.pruning.teacher.replay import Replay
from runtimes.errors import InputError, ParityError
from runtimes.schedulers import from_config
from tests.deploy.test_prune_network import CROSS, PLAIN, unet

CONFIG = {"_class_name": "DDIMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
          "clip_sample": False, "set_alpha_to_one": True, "timestep_spacing": "trailing"}

DIFFUSION = Diffusion.from_config({**CONFIG, "prediction_type": "v_prediction"})


class Interrupted(Exception):
    """A kill in the middle of training."""


def make(folder, recipe, *, student=None, size=4, **more):
    teacher = Observed(unet(levels=(CROSS, PLAIN), widths=(16, 16)))
    if student is None:
        student = copy.deepcopy(unet(levels=(CROSS, PLAIN), widths=(16, 16)))
        student.conv_out.weight.mul_(0.5)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randn(3, 5, 12, generator=generator)
    stream = Trajectories(teacher, DIFFUSION, prompts, torch.zeros(5, 12), (4, 8, 8), 3.0, size, recipe.seed)
    recipe = replace(recipe, memory=64)
    return Training(Distillation(student, teacher, stream, recipe, 3.0), recipe, folder, **more), stream


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_a_step_is_what_our_ddim_does(prediction):
    config = {**CONFIG, "prediction_type": prediction}
    diffusion, run = Diffusion.from_config(config), from_config(config).start(10)
    sample, output = (torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    for i, timestep in enumerate(run.timesteps):
        after = torch.tensor([int(timestep) - 100])
        ours = diffusion.step(output, torch.tensor([int(timestep)]), after, sample)
        np.testing.assert_allclose(ours, run.step(output.numpy(), i, sample.numpy()), rtol=2e-5, atol=2e-5)


def test_a_perfect_prediction_is_the_target_of_its_kind():
    original, noise = (torch.randn(2, 4, 2, 2, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    timestep = torch.tensor([10, 900])
    for prediction in ("epsilon", "v_prediction", "sample"):
        diffusion = Diffusion.from_config({**CONFIG, "prediction_type": prediction})
        sample = diffusion.noised(original, noise, timestep)
        target = diffusion.target(original, noise, timestep)
        clean = diffusion.step(target, timestep, torch.tensor([-1, -1]), sample)
        torch.testing.assert_close(clean, original, rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match="prediction_type 'flow' is unknown"):
        Diffusion.from_config({**CONFIG, "prediction_type": "flow"})


def test_trajectories_start_from_noise_end_clean_and_visit_all_of_the_schedule(tmp_path):
    _, stream = make(tmp_path, Recipe(1))
    assert (stream.advance().timestep == 999).all()
    visited = torch.cat([stream.advance().timestep for _ in range(60)])
    assert len(stream.finished) >= 4 and torch.isfinite(torch.stack(stream.finished)).all()
    counts = torch.histc(visited.float(), 10, 0, 1000)
    assert (counts > 0).all(), "every tenth of the schedule is seen"
    assert len(visited.unique()) > 60, "not only one sampler's timesteps"


def test_a_mixed_batch_holds_calls_of_the_teacher_from_all_of_the_schedule():
    teacher = Observed(unet(levels=(CROSS, PLAIN), widths=(16, 16)))
    stream = Trajectories(teacher, DIFFUSION, torch.randn(3, 5, 12), torch.zeros(5, 12), (4, 8, 8), 3.0, 8)
    replay = Replay(teacher, stream, size=250, seed=0)
    batches = [replay.mixed() for _ in range(5)]
    batch, maps = batches[-1]
    with teacher.recording() as wanted:
        expected = teacher(batch.sample, batch.timestep, batch.states)
    torch.testing.assert_close(batch.output, expected)
    assert set(maps) == set(wanted) and maps
    for name, values in maps.items():
        torch.testing.assert_close(values, wanted[name])
    visited = torch.cat([b.timestep for b, _ in batches])
    assert (torch.histc(visited.float(), 4, 0, 1000) > 0).all(), "every quarter of the schedule in a few batches"
    assert (batch.timestep[:8] == batch.timestep[8:]).all() and len(batch.timestep.unique()) > 4


def test_the_teacher_is_asked_once_for_each_batch_after_the_memory_is_full():
    teacher = Observed(unet(levels=(CROSS, PLAIN), widths=(16, 16)))
    calls = []

    def counted(*feeds):
        calls.append(1)
        return teacher(*feeds)

    stream = Trajectories(counted, DIFFUSION, torch.randn(3, 5, 12), torch.zeros(5, 12), (4, 8, 8), 3.0, 8)
    replay = Replay(teacher, stream, size=30, seed=0)
    for number in range(7):
        replay.mixed()
        assert len(calls) == 4 + number
    assert not stream.finished, "what is generated is not kept"


def test_the_student_comes_nearer_to_its_teacher(tmp_path):
    training, _ = make(tmp_path, Recipe(40, learning_rate=1e-3, warmup=5, ema=0.8), size=4)
    _, other = make(tmp_path / "other", Recipe(1, seed=5))
    judged = [other.advance() for _ in range(2)]
    before = relative_error(training.task.network, judged)
    errors = []
    network = training.run(lambda step, error: errors.append(error))
    assert len(errors) == 40
    after = relative_error(network, judged)
    assert after < 0.75 * before, (before, after)
    assert not any(p.requires_grad for p in network.parameters())


def test_an_interrupted_recovery_ends_as_if_it_had_not_been_interrupted(tmp_path):
    recipe = Recipe(6, warmup=2, accumulate=2)
    whole = make(tmp_path / "whole", recipe)[0].run()

    def kill(step, error):
        if step == 3:
            raise Interrupted

    first, _ = make(tmp_path / "cut", recipe)
    with pytest.raises(Interrupted):
        first.run(kill)
    first.save()
    second, _ = make(tmp_path / "cut", recipe)
    assert second.step == 3
    resumed = second.run()
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_a_checkpoint_of_another_recipe_is_not_gone_on_from(tmp_path):
    make(tmp_path, Recipe(2))[0].run()
    assert make(tmp_path, Recipe(2))[0].step == 2
    assert make(tmp_path, Recipe(3))[0].step == 0


def test_fewer_trajectories_at_a_time_make_steps_of_as_many(monkeypatch):
    seen = []

    class Asked(Exception):
        """What would be trained is known."""

    def train(task, recipe, *rest, **more):
        seen.append((task, recipe))
        raise Asked

    teacher = Observed(unet(levels=(CROSS, PLAIN), widths=(16, 16)))
    generated = Teacher(teacher.network, teacher, DIFFUSION, torch.randn(3, 5, 12), torch.zeros(5, 12), (4, 8, 8), 3.0)
    monkeypatch.setattr(Teacher, "load", lambda *_: generated)
    monkeypatch.setattr(recover_network, "load_source_module", lambda *_: copy.deepcopy(teacher.network))
    monkeypatch.setattr(recover_network, "train", train)
    source: Any = SimpleNamespace(component=lambda name: SimpleNamespace(sha256=name),
                                  manifest=SimpleNamespace(pipeline=SimpleNamespace(encoders=("text_encoder",))))
    monkeypatch.setattr(recover_network, "pipeline_identity", lambda _: "")
    config = {"steps": 5, "prompts": [], "guidance_scale": 3.0, "keep_zeros": False}
    for more in ({}, {"batch": 8}, {"batch": 5}):
        with pytest.raises(Asked):
            recover_network.recover_denoiser(source, "unet", "unet_teacher", {**config, **more})
    assert [recipe.accumulate for _, recipe in seen] == [1, 4, 7]
    assert [len(task._replay._trajectories._latents) for task, _ in seen] == [32, 8, 5]


def test_masked_weights_stay_zero(tmp_path):
    student = copy.deepcopy(unet(levels=(CROSS, PLAIN), widths=(16, 16)))
    mask_two_of_four(student)
    before = student.down_blocks[0].resnets[0].conv1.weight.clone()
    network = make(tmp_path, Recipe(3, warmup=1), student=student, keep_zeros=True)[0].run()
    after = network.down_blocks[0].resnets[0].conv1.weight
    assert torch.equal(after == 0, before == 0) and not torch.equal(after, before)


def test_a_loss_that_is_not_finite_stops_the_recovery(tmp_path):
    student = copy.deepcopy(unet(levels=(CROSS, PLAIN), widths=(16, 16)))
    student.conv_out.bias.fill_(float("nan"))
    with pytest.raises(ParityError, match="the loss is not finite"):
        make(tmp_path, Recipe(2), student=student)[0].run()
