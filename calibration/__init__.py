"""Quantization's arithmetic: inputs recorded along denoising trajectories, ranges, integers, and where they are placed.

Imports runtimes only.
"""
