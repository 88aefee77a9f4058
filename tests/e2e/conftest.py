"""Fixtures for end-to-end tests."""

from arithmetic_fixtures import arguments, reference, start

__all__ = ["arguments", "reference", "start"]
