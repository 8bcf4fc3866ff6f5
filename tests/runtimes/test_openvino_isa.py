"""ONEDNN_MAX_CPU_ISA, which limits PyTorch, must not reach OpenVINO: it answers wrongly or crashes under it."""

from __future__ import annotations

import os

import pytest

openvino = pytest.importorskip("openvino")
from runtimes.backends import openvino_session  # noqa: E402


@pytest.mark.parametrize("limit", ["AVX2", None])
def test_the_limit_is_hidden_while_the_plug_in_reads_it_and_is_there_again_afterwards(monkeypatch, limit):
    seen: list[str | None] = []
    real = openvino.Core

    def core() -> object:
        seen.append(os.environ.get("ONEDNN_MAX_CPU_ISA"))
        return real()

    monkeypatch.setattr(openvino, "Core", core)
    if limit is None:
        monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    else:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    openvino_session.new_core()
    assert seen == [None] and os.environ.get("ONEDNN_MAX_CPU_ISA") == limit
