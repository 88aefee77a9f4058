"""Fixtures for end-to-end tests."""

from arithmetic_fixtures import arguments, start

__all__ = ["arguments", "start"]
