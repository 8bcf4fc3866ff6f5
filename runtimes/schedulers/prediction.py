"""What a model's output says about the clean sample and the noise, for each way a model can be trained.

Everything here is in the variance-preserving form x_t = alpha x_0 + sigma noise, alpha^2 + sigma^2 = 1.
Arrays: (B, C, H, W) float32; alpha and sigma are Python floats, so that float32 stays float32.
"""

from __future__ import annotations

from runtimes.schedulers.sigmas import Float32

EPSILON, V_PREDICTION, SAMPLE = "epsilon", "v_prediction", "sample"


def to_original(kind: str, model_output: Float32, sample: Float32, alpha: float, sigma: float) -> Float32:
    """The clean sample x_0 that `model_output` implies.

    epsilon: Ho et al., Denoising Diffusion Probabilistic Models, arXiv 2006.11239, eq. 15.
    v_prediction: v = alpha noise - sigma x_0, Salimans & Ho, Progressive Distillation, arXiv 2202.00512, appendix D.
    """
    if kind == EPSILON:
        clean: Float32 = sample - sigma * model_output
        return (1 / alpha) * clean
    if kind == V_PREDICTION:
        return alpha * sample - sigma * model_output
    return model_output


def to_epsilon(kind: str, model_output: Float32, sample: Float32, alpha: float, sigma: float) -> Float32:
    """The unit-variance noise that `model_output` implies; the sources are those of `to_original`."""
    if kind == EPSILON:
        return model_output
    if kind == V_PREDICTION:
        return alpha * model_output + sigma * sample
    noise: Float32 = sample - alpha * model_output
    return (1 / sigma) * noise
