"""Fixtures of the layout tests."""

from __future__ import annotations

from layout_fixtures import *  # noqa: F403 - fixtures are found by name
