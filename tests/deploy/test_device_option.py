"""`--device`: the same names for every command, read before anything else happens, and passed on whole."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

from runtimes.system.device import Device
from tests.deploy.conftest import Cli

COMMANDS = [("generate", "bundle", "a cat"), ("verify", "bundle"), ("bench", "bundle"), ("tradeoffs", "bundle"),
            ("diagnose", "bundle")]


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_no_device_is_refused_before_the_bundle_is_looked_for(cli: Cli, command: tuple[str, ...]):
    result = cli(*command, "--device", "cuda:one")
    assert result.code == 2 and "'cuda:one' is no device" in result.out + result.err


@pytest.mark.parametrize(("command", "called"), list(zip(COMMANDS, (
    "deploy.cli.generate.generate_files", "deploy.building.verify.verify_bundle", "deploy.bench.contest.run_bench",
    "deploy.bench.tradeoffs.measure", "deploy.diagnose.run_checks.diagnose_pipeline"), strict=True)))
def test_the_number_of_the_gpu_reaches_what_the_command_calls(cli: Cli, monkeypatch: pytest.MonkeyPatch,
                                                              command: tuple[str, ...], called: str):
    found: list[Any] = []

    class Reached(Exception):
        pass

    def stop(*arguments: Any, **named: Any) -> None:
        found.extend([*arguments, *named.values()])
        raise Reached

    module, _, name = called.rpartition(".")
    monkeypatch.setattr(importlib.import_module(module), name, stop)
    monkeypatch.setattr("runtimes.bundle.folder.Bundle.open", lambda *arguments, **named: None)
    with pytest.raises(Reached):
        cli(*command, "--device", "CUDA:1")
    assert Device("cuda", 1) in [getattr(value, "device", value) for value in found]
