"""Fixtures for end-to-end tests."""

from arithmetic_fixtures import arguments, reference, reference_run

__all__ = ["arguments", "reference", "reference_run"]
