"""The command line as users run it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "examples" / "arithmetic" / "config.yaml"


def command_line(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run `megatron-gpc ARGUMENTS` to its end."""
    return subprocess.run(
        [sys.executable, "-m", "megatron_gpc", *arguments],
        capture_output=True,
        text=True,
        timeout=200,
        cwd=ROOT,
        **options,
    )


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
