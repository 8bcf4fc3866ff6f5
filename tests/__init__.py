"""The tests, in the folders of what they test; not part of the wheel."""
