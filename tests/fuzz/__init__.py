"""The differential fuzzer: generated pipelines and requests, ours against diffusers', equal or refused in one line."""
