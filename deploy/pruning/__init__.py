"""Pruning of U-Nets and autoencoders into smaller networks that diffusers builds from their config, and recovery."""
