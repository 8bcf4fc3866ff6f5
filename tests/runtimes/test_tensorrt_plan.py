"""What running an engine needs decided: all of it without a GPU."""

from __future__ import annotations

import dataclasses
import struct

import pytest

from runtimes.backends.tensorrt.engine_plan import (
    ALIGNMENT,
    ShapeLimits,
    check_builder,
    check_gpu,
    check_header,
    check_validity,
    check_version,
    choose_profile,
    plan_buffers,
    profiles_of,
    runtime_cache_file,
    shape_key,
)
from runtimes.bundle.manifest import to_json
from runtimes.bundle.tensors import Axis, ShapeRange, TensorSpec
from runtimes.errors import BundleError, InputError, UnavailableError
from tests.runtimes.engine_bundles import engine_details
from tests.runtimes.fakes import component

SMALL = {"x": ShapeLimits((1, 4, 8), (1, 4, 8), (4, 4, 16))}
LARGE = {"x": ShapeLimits((2, 4, 8), (8, 4, 16), (16, 4, 32))}
PART = component((TensorSpec("x", "float32", ("batch", 4, "width")), TensorSpec("t", "int64", ("batch",))),
                 (TensorSpec("y", "float16", ("batch", "width")),),
                 {"batch": Axis("rows", ShapeRange(1, 2, 5)), "width": Axis("columns", ShapeRange(8, 8, 32))},
                 details=engine_details(builder="tensorrt-rtx", builder_version="1.7.1.116", gpu="",
                                        compute_capabilities=["SM86", "SM89"],
                                        refused_capabilities={"SM75": "no FP32 GEMM"}))


def with_details(**details):
    return dataclasses.replace(PART, details=engine_details(**{**to_json(PART.details), **details}))


@pytest.mark.parametrize(("shape", "chosen"), [
    ((1, 4, 8), 0), ((4, 4, 16), 1), ((2, 4, 8), 0), ((16, 4, 32), 1), ((8, 4, 16), 1),
])
def test_the_profile_tuned_nearest_is_chosen_among_those_that_hold_the_shapes(shape, chosen):
    assert choose_profile([SMALL, LARGE], {"x": shape}, "unet") == chosen


@pytest.mark.parametrize("shape", [(1, 4, 32), (17, 4, 8), (1, 4), (1, 5, 8)])
def test_shapes_that_no_profile_holds_are_refused_with_what_the_engine_takes(shape):
    with pytest.raises(InputError, match=r"no profile .* holds x .*x 1x4x8 to 4x4x16; or x 2x4x8 to 16x4x32"):
        choose_profile([SMALL, LARGE], {"x": shape}, "unet")


def test_profiles_are_read_from_the_manifest():
    part = with_details(profiles=[{"x": [[1, 4, 8], [1, 4, 8], [4, 4, 16]]}])
    assert profiles_of(part, "unet") == (SMALL,)


@pytest.mark.parametrize("profiles", [[], [{"x": [[1], [2]]}]])
def test_profiles_that_make_no_sense_are_a_bundle_error(profiles):
    with pytest.raises(BundleError, match="does not state the engine's profiles"):
        profiles_of(with_details(profiles=profiles), "unet")


def test_buffers_hold_the_largest_shapes_and_do_not_overlap():
    plan = plan_buffers(PART, "unet")
    assert plan.sizes == {"x": 5 * 4 * 32 * 4, "t": 5 * 8, "y": 5 * 32 * 2}
    ends = [plan.offsets[n] + plan.sizes[n] for n in plan.offsets]
    starts = [*list(plan.offsets.values())[1:], plan.total_bytes]
    assert all(end <= start for end, start in zip(ends, starts, strict=True))
    assert all(offset % ALIGNMENT == 0 for offset in plan.offsets.values())


def test_an_output_of_unknown_size_is_refused():
    part = dataclasses.replace(PART, outputs=(TensorSpec("y", "float32", ("found",)),))
    with pytest.raises(BundleError, match="y has the axis found without a range"):
        plan_buffers(part, "unet")


def test_a_graph_is_good_for_its_shapes_and_profile_only():
    key = shape_key(0, {"a": (1,), "b": (2,)})
    assert key == shape_key(0, {"b": (2,), "a": (1,)})
    assert key != shape_key(1, {"a": (1,), "b": (2,)}) and key != shape_key(0, {"a": (2,), "b": (2,)})


def test_an_engine_of_another_release_is_refused_with_both_versions():
    check_version(PART, "1.7.1.116", "unet")
    with pytest.raises(UnavailableError, match=r"built by tensorrt-rtx 1.7.1.116, here is 1.8.0.1 .*==1.7.1.116"):
        check_version(PART, "1.8.0.1", "unet")


def test_a_version_compatible_engine_runs_within_its_major_release():
    part = with_details(builder="tensorrt", builder_version="11.4.0", options={"version_compatible": True})
    check_version(part, "11.9.1", "unet")
    with pytest.raises(UnavailableError):
        check_version(part, "12.0.0", "unet")


def test_a_gpu_without_code_in_the_engine_is_refused_with_the_builders_reason():
    check_gpu(PART, "RTX 4090", (8, 9), "unet")
    with pytest.raises(UnavailableError, match=r"H100 is SM90, the engine is for SM86, SM89"):
        check_gpu(PART, "H100", (9, 0), "unet")
    with pytest.raises(UnavailableError, match=r"T4 is SM75.*refused SM75: no FP32 GEMM"):
        check_gpu(PART, "T4", (7, 5), "unet")


def test_an_engine_of_one_gpu_is_refused_on_another_unless_built_for_more():
    part = with_details(compute_capabilities=[], gpu="NVIDIA H100, 9.0")
    check_gpu(part, "NVIDIA H100", (9, 0), "unet")
    with pytest.raises(UnavailableError, match=r"A100 is SM80, the engine was built on NVIDIA H100, 9.0"):
        check_gpu(part, "A100", (8, 0), "unet")
    portable = with_details(compute_capabilities=[], gpu="A100, 8.0", options={"hardware": "ampere-plus"})
    check_gpu(portable, "H100", (9, 0), "unet")


def test_unknown_builders_are_refused():
    assert check_builder(PART, "unet") == "tensorrt-rtx"
    with pytest.raises(BundleError, match="builder is 'tvm'"):
        check_builder(with_details(builder="tvm"), "unet")


def header(magic: bytes = b"vtrt", size: int = 1000) -> bytes:
    return magic + bytes(12) + struct.pack("<Q", size) + bytes(40)


def test_a_cut_engine_is_seen_before_a_driver_is_asked():
    check_header(header(), 1000, "unet")
    with pytest.raises(BundleError, match="the engine has 999 bytes, its header says 1000"):
        check_header(header(), 999, "unet")


def test_engines_of_another_layout_are_left_to_tensorrt():
    check_header(header(b"ftrt", 0), 1000, "unet")


@pytest.mark.parametrize("head", [b"", b"vtrt", b"PK\x03\x04" + bytes(60), b"<?xml version" + bytes(60)])
def test_files_that_are_no_engines_are_refused(head):
    with pytest.raises(BundleError, match="not a TensorRT engine"):
        check_header(head, len(head), "unet")


@pytest.mark.parametrize(("diagnostics", "message"), [
    (["UNSUPPORTED_CC"], "no code for this GPU"), (["CUDA_ERROR", "OLD_CUDA_DRIVER"], "CUDA failed"),
    (["VERSION_MISMATCH"], "another TensorRT version"), ([], "without a reason"), (["NEW_ONE"], "without a reason"),
])
def test_tensorrts_own_diagnosis_becomes_one_line(diagnostics, message):
    check_validity(True, diagnostics, "unet")
    with pytest.raises(UnavailableError, match=message):
        check_validity(False, diagnostics, "unet")


def test_kernels_are_stored_per_engine_gpu_and_release(tmp_path):
    files = {runtime_cache_file(tmp_path, part, gpu, version) for part in (PART, dataclasses.replace(
        PART, files={"a": _record("1")})) for gpu in ("A", "B") for version in ("1.7", "1.8")}
    assert len(files) == 8
    assert runtime_cache_file(tmp_path, PART, "A", "1.7") in files


def _record(sha: str):
    from runtimes.bundle.manifest import FileRecord

    return FileRecord(1, sha)
