"""From a diffusers folder to files that a runtime executes. Nothing heavy is imported until a function needs it."""
