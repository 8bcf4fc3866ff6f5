"""The proof against diffusers itself: weights, feeds of the networks, and images, of the pipeline that it loads."""
