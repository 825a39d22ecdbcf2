"""Checks of this project on tiny bases of every architecture of transformers: `jobs/architectures.py`."""
