"""Options of engines: what is refused before any builder is asked."""

from __future__ import annotations

import pytest

from exporters.tensorrt.engine_options import EngineOptions
from runtimes.errors import InputError


@pytest.mark.parametrize(("values", "builder", "message"), [
    ({"capabilitis": ["SM89"]}, "tensorrt-rtx", "unknown engine option 'capabilitis'.*capabilities"),
    ({"tf32": 1}, "tensorrt-rtx", "tf32 is 1, expected bool"),
    ({"capabilities": "SM89"}, "tensorrt", "capabilities with tensorrt is not possible"),
    ({"version_compatible": True}, "tensorrt-rtx", "lean runtime"),
    ({"hardware": "ampere-plus"}, "tensorrt-rtx", "hardware and tiling with tensorrt-rtx"),
    ({"hardware": "all"}, "tensorrt", "one of none, ampere-plus"),
    ({"refittable": True}, "tensorrt-rtx", "stripped engine ahead of time is not possible"),
    ({"stripped": True, "capabilities": "SM89"}, "tensorrt-rtx", "capabilities=current on the machine"),
    ({"optimization_level": 9}, "tensorrt", "0 to 5"),
    ({"workspace_bytes": -1}, "tensorrt", "number of bytes"),
    ({}, "tensort", "one of tensorrt, tensorrt-rtx"),
])
def test_options_that_a_builder_would_ignore_or_crash_on_are_refused(values, builder, message):
    with pytest.raises(InputError, match=message):
        EngineOptions.from_mapping(values, builder)


def test_capabilities_are_read_in_any_spelling():
    assert EngineOptions.from_mapping({"capabilities": "sm86+SM89"}, "tensorrt-rtx").capabilities == ("SM86", "SM89")
    assert EngineOptions.from_mapping({"capabilities": ["current"]}, "tensorrt-rtx").capabilities == ("current",)
