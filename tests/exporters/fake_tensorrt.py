"""A stand-in for the module `tensorrt`: as much of its interface as the worker uses, failing as $FAKE_TENSORRT says."""

from __future__ import annotations

import enum
import os
import signal
import sys
from typing import Any

MODE = os.environ.get("FAKE_TENSORRT", "")
__version__ = "11.4.0"


class ILogger:
    pass


class Logger:
    ERROR = 1

    def __init__(self, severity):
        pass


class IErrorRecorder:
    def __init__(self):
        pass


class NetworkDefinitionCreationFlag(enum.IntEnum):
    STRONGLY_TYPED = 1


class BuilderFlag(enum.IntEnum):
    TF32 = 0
    REFIT = 1
    STRIP_PLAN = 2
    WEIGHT_STREAMING = 3


class MemoryPoolType(enum.IntEnum):
    WORKSPACE = 0


class _Code(enum.Enum):
    UNSUPPORTED_NODE = 0

    def __str__(self):
        return "ErrorCode.UNSUPPORTED_NODE"


class _Error:
    def code(self):
        return _Code.UNSUPPORTED_NODE

    def desc(self):
        return "false"

    def node(self):
        return 7

    def node_name(self):
        return "decoder/det"

    def node_operator(self):
        return "Det"


class OnnxParser:
    num_errors = 1

    def __init__(self, network, logger):
        pass

    def parse_from_file(self, path):
        return MODE != "refuse"

    def get_error(self, index):
        return _Error()


class _Output:
    dtype = "DataType.FLOAT"


class _Layer:
    num_outputs = 1

    def get_output(self, index):
        return _Output()


class _Network:
    num_layers = 3

    def get_layer(self, index):
        return _Layer()


class _Cache:
    def __init__(self, content):
        self.content = content

    def serialize(self):
        return self.content + b"timed;"


class IProgressMonitor:
    pass


class _Config:
    progress_monitor: IProgressMonitor | None = None

    def __init__(self):
        self.profiles = []

    def set_flag(self, flag):
        pass

    clear_flag = set_flag

    def set_memory_pool_limit(self, pool, size):
        pass

    def add_optimization_profile(self, profile):
        self.profiles.append(profile)
        return 0

    def create_timing_cache(self, content):
        return _Cache(content)

    def set_timing_cache(self, cache, ignore_mismatch):
        self.cache = cache

    def get_timing_cache(self):
        return self.cache


class _Profile(dict):
    def set_shape(self, name, low, common, high):
        self[name] = (low, common, high)


class Builder:
    def __init__(self, logger):
        self.error_recorder: Any = None

    def create_network(self, flags):
        assert flags == 1 << NetworkDefinitionCreationFlag.STRONGLY_TYPED
        return _Network()

    def create_builder_config(self):
        return _Config()

    def create_optimization_profile(self):
        return _Profile()

    def build_serialized_network(self, network, config):
        errors = {"driver": "Cuda error 35: CUDA driver version is insufficient for CUDA runtime version",
                  "memory": "Requested amount of GPU memory could not be allocated: OutOfMemory",
                  "layer": "Could not find any implementation for node conv_in"}
        if MODE == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if MODE == "crash":
            sys.stderr.write("assertion failed in kernel_gen.cpp\n")
            os.abort()
        if MODE == "exit":
            sys.stderr.write("something went wrong\n")
            sys.exit(3)
        if MODE in errors:
            self.error_recorder.report_error(1, errors[MODE])
            return None
        return b"" if MODE == "cut" else b"ftrt" + bytes(96)
