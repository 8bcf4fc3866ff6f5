"""Calibration of quantized graphs: what is recorded along the denoising trajectory. Imports runtimes only."""
