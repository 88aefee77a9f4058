"""Fixtures for end-to-end tests."""

from arithmetic_fixtures import arguments, reference, reference_run, start

__all__ = ["arguments", "reference", "reference_run", "start"]
