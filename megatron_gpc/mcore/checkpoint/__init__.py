"""Checkpoints of a run: saved, found, resumed, at any layout."""
