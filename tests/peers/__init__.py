"""Side-by-side measurements against other projects, each in an environment of its own; never run by default."""
