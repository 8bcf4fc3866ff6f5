"""Which shapes are compared: common, smallest, and one that nothing was traced at."""

from __future__ import annotations

import pytest

from deploy.parity.reference.planned_shapes import plan_runs
from runtimes.bundle.manifest import Component
from runtimes.bundle.tensors import Axis, ShapeRange, TensorSpec
from runtimes.errors import InputError
from tests.runtimes.roles import stable_diffusion as sd_roles

FACTS = sd_roles(4, 8, 0.18215, 512, 512, 77)


def component(*shape: int | str, **axes: tuple[ShapeRange, int]) -> Component:
    spec = TensorSpec("x", "float32", shape)
    named = {name: Axis(name, span, multiple) for name, (span, multiple) in axes.items()}
    return Component("onnx", "model.onnx", {}, (spec,), (spec,), named, "Net", "fp32", 1)


def stable_diffusion(batch: ShapeRange, rows: ShapeRange) -> dict[str, Component]:
    doubled = ShapeRange(batch.min, 2 * batch.opt, 2 * batch.max), 1
    pixels = ShapeRange(8 * rows.min, 8 * rows.opt, 8 * rows.max), 64
    return {
        "text_encoder": component("batch", "sequence", batch=doubled, sequence=(ShapeRange(1, 77, 77), 1)),
        "unet": component("batch", 4, "height", "width", batch=doubled, height=(rows, 8), width=(rows, 8)),
        "vae_decoder": component("batch", 4, "height", "width", batch=(batch, 1), height=(rows, 8), width=(rows, 8)),
        "vae_encoder": component("batch", 3, "h", "w", batch=(batch, 1), h=pixels, w=pixels),
    }


def sizes(runs, name):
    return [tuple(run.sizes[name].values()) for run in runs]


def test_every_component_gets_three_distinct_shapes():
    components = stable_diffusion(ShapeRange(1, 1, 8), ShapeRange(8, 64, 256))
    runs = plan_runs(components, FACTS)
    for name in components:
        assert len(set(sizes(runs, name))) >= 3
    assert sizes(runs, "unet")[0] == (2, 64, 64)
    assert sizes(runs, "unet")[1] == (1, 8, 8)


def test_the_third_shape_is_odd_in_batch_not_square_and_none_of_min_opt_max():
    components = stable_diffusion(ShapeRange(1, 1, 8), ShapeRange(8, 64, 256))
    batch, height, width = sizes(plan_runs(components, FACTS), "unet")[2]
    assert batch % 2 == 1 and batch > 1
    assert height != width
    assert not {height, width} & {8, 64, 256}
    assert height % 8 == width % 8 == 0
    assert max(height, width) <= 96


def test_all_components_share_the_image_that_a_run_generates():
    for run in plan_runs(stable_diffusion(ShapeRange(1, 1, 8), ShapeRange(8, 64, 256)), FACTS):
        unet, encoder = run.sizes["unet"], run.sizes["vae_encoder"]
        assert (run.height, run.width) == (8 * unet["height"], 8 * unet["width"])
        assert (encoder["h"], encoder["w"]) == (run.height, run.width)
        assert 2 * run.images >= unet["batch"] and run.images >= encoder["batch"]


def test_min_equal_to_opt_still_gives_three_shapes():
    components = stable_diffusion(ShapeRange(1, 1, 8), ShapeRange(64, 64, 64))
    for name in components:
        assert len(set(sizes(plan_runs(components, FACTS), name))) >= 3


def test_a_static_build_has_one_shape_and_a_batch_of_one_no_guidance():
    fixed = {"unet": component(1, 4, 64, 64), "vae_decoder": component(1, 4, 64, 64)}
    (run,) = plan_runs(fixed, FACTS)
    assert (run.images, run.height, run.width, run.guided) == (1, 512, 512, False)


def test_ranges_without_a_common_size_are_refused():
    components = stable_diffusion(ShapeRange(1, 1, 8), ShapeRange(8, 64, 128))
    components["vae_decoder"] = component(1, 4, 136, 136)
    with pytest.raises(InputError, match="no latent size in common"):
        plan_runs(components, FACTS)


def test_an_axis_without_a_range_is_refused():
    with pytest.raises(InputError, match="'batch' has no range"):
        plan_runs({"unet": component("batch", 4, 8, 8)}, FACTS)


def one_value(name: str, sizes) -> bool:
    """A U-Net with two halvings and one channel a group: a group norm of the middle sees rows x height/4 x width/4."""
    return name != "unet" or sizes["batch"] * (sizes["height"] // 4) * (sizes["width"] // 4) > 1


@pytest.mark.parametrize(("batch", "smallest"), [
    (ShapeRange(1, 1, 8), (2, 4, 4)),  # the batch grows first
    (ShapeRange(1, 1, 1), (1, 8, 8)),  # then the latents
])
def test_shapes_that_the_source_model_cannot_run_are_left_out(batch, smallest):
    rows = ShapeRange(4, 16, 32)
    unet = component("batch", 4, "height", "width", batch=(batch, 1), height=(rows, 4), width=(rows, 4))
    decoder = component("batch", 4, "height", "width", batch=(batch, 1), height=(rows, 4), width=(rows, 4))
    components = {"unet": unet, "vae_decoder": decoder}
    runs = plan_runs(components, FACTS, possible=one_value)
    assert sizes(runs, "unet")[1] == smallest
    assert sizes(plan_runs(components, FACTS), "unet")[1] == (1, 4, 4)
    for run in runs:
        recorded = {**run.sizes["unet"], "batch": run.images * (2 if run.guided else 1)}
        assert one_value("unet", run.sizes["unet"]) and one_value("unet", recorded)


def test_a_range_that_the_source_model_cannot_run_at_all_is_left_for_the_reference_to_refuse():
    rows = ShapeRange(4, 4, 4)
    unet = component(1, 4, "height", "width", height=(rows, 4), width=(rows, 4))
    (run,) = plan_runs({"unet": unet}, FACTS, possible=lambda name, sizes: False)
    assert run.sizes["unet"] == {"height": 4, "width": 4}
