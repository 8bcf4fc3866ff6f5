"""Prunes U-Nets and autoencoders to smaller networks that diffusers builds from their config, and retrains them."""
