"""docs/config.md says what config/schema.py says."""

from __future__ import annotations

import runpy

from commands import ROOT


def test_the_page_of_keys_is_current():
    page = runpy.run_path(str(ROOT / "tools" / "config_docs.py"))["page"]
    assert (ROOT / "docs" / "config.md").read_text() == page(), "run `make docs` and commit it"
