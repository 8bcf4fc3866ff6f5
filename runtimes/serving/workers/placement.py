"""Divides a machine among workers: one for each device, of the CPU one for each group of cores."""

from __future__ import annotations

from runtimes.errors import InputError
from runtimes.serving.options import EngineOptions, ServerOptions
from runtimes.serving.workers.connected_engine import WorkerOptions
from runtimes.serving.workers.machine import CoreGroup, Machine
from runtimes.system.byte_sizes import parse_bytes
from runtimes.system.device import KINDS, Device

MOST_WORKERS = 256


def placed(options: EngineOptions, machine: Machine | None = None) -> list[WorkerOptions]:
    """The workers that options ask for on this machine.

    Args:
        options: of `serve` or `serve-engine`.
        machine: what there is; found out if None.

    Raises:
        InputError: a device that is none or is named twice, or more workers than can be.
    """
    if options.device == "none":
        if isinstance(options, ServerOptions):
            return []
        raise InputError("an engine needs a device", where="--device", fix="leave it out for the CPU, or give cuda:0")
    machine = machine or Machine.here()
    devices = [Device.parse(name) for name in options.device.split(",")]
    if len(set(devices)) < len(devices):
        raise InputError(f"{options.device} names a device twice", where="--device", fix="name each once")
    on_cpu = any(device.kind == "cpu" for device in devices)
    if options.workers and not on_cpu:
        raise InputError("they are workers of the CPU, which is not among the devices", where="--workers",
                         fix="leave it out, or add cpu to --device")
    count = (options.workers or machine.workers()) if on_cpu else 0
    if count > MOST_WORKERS:
        raise InputError(f"{count} are too many", where="--workers", fix=f"at most {MOST_WORKERS}")
    groups = machine.core_groups(count) if on_cpu else []
    places: list[tuple[str, Device, CoreGroup]] = []
    for device in devices:
        if device.kind == "cpu":
            places += [(f"cpu-{i}", device, group) for i, group in enumerate(groups)]
        else:
            name = f"{device.kind}:{device.index}" if KINDS[device.kind] else device.kind
            places.append((name, device, CoreGroup(machine.threads)))
    most = parse_bytes(options.memory, "--memory") if options.memory else machine.memory_each(len(places))
    return [WorkerOptions(name, str(device), group.cores, group.threads, options.batch, most, options.deterministic,
                          log_format=options.log_format)
            for name, device, group in places]
