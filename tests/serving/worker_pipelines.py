"""Numpy pipelines that worker processes of tests load in place of bundles: see `WorkerOptions.pipelines`."""

from __future__ import annotations

import os
import signal
import time

import numpy as np

from runtimes.pipeline.diffusion import Pipeline
from runtimes.serving.engine.sources import Offered
from tests.runtimes.fakes import DDIM, FACTS, fake_sessions, tokenize

DEADLY, HANGING = "deadly prompt", "hang"


def quick(offered: Offered) -> Pipeline:
    """Functions of numpy without any delay."""
    return fake(0.0)


def slow(offered: Offered) -> Pipeline:
    """A denoiser that takes 20 ms more; the process dies of one prompt, and stops of another."""
    return fake(0.02)


def fake(seconds: float) -> Pipeline:
    """Numpy functions; the denoiser sleeps so long."""
    sessions = fake_sessions(batch=16)
    unet = sessions["unet"].function

    def slowed(**feeds):
        if seconds:
            time.sleep(seconds)
        for text, number in ((DEADLY, signal.SIGKILL), (HANGING, signal.SIGSTOP)):
            if np.isclose(feeds["encoder_hidden_states"][:, 0, 0], np.sin(len(text)), atol=1e-5).any():
                os.kill(os.getpid(), number)
        return unet(**feeds)

    sessions["unet"].function = slowed
    return Pipeline(sessions, FACTS, DDIM, tokenize)
