"""What tests/gpu/check.sh measures: each part in a process and with a deadline of its own.

    python tests/gpu/check.py [--out FOLDER] [--budget SECONDS] [PART ...]

The cheapest and most telling parts come first, and one that fails costs no other.  Sizes are real
on a GPU and small without one.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import measures
import torch
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = {"tests": 150.0, "example": 150.0}
"""Of a part [s], if it is not PART_S."""
PART_S = 120.0
LOG_LINES = 15


def machine() -> dict[str, Any]:
    """What the figures belong to."""
    try:
        asked = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(asked, capture_output=True, text=True).stdout.strip()
    except OSError:  # a bare machine may have no git
        commit = ""
    found: dict[str, Any] = {
        **{"commit": commit or "unknown", "python": platform.python_version()},
        **{"torch": torch.__version__, "cuda": torch.version.cuda or "none", "gpu": "none"},
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
        found["gpus"] = torch.cuda.device_count()
        found["memory_GiB"] = round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1)
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def tests() -> dict[str, Any]:
    """tests/gpu: every layout that the GPUs here allow, and offloading."""
    asked = ("-q", "--maxfail=5", "--durations=0", "-p", "no:cacheprovider")
    return _program(sys.executable, "-m", "pytest", *asked, str(ROOT / "tests" / "gpu"))


def example() -> dict[str, Any]:
    """The main job (examples/entropy_control) for 10 steps on one GPU, with the embedded server."""
    with TemporaryDirectory() as folder:
        done = _program(
            *(sys.executable, "-m", "megatron_gpc", "train"),
            *(str(ROOT / "examples" / "entropy_control" / "config.yaml"), f"run_dir={folder}/run"),
            *("train.steps=10", "parallel.tp=1", "parallel.pp=1", "plots=false", "resume=none"),
        )
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
    first, last = (json.loads(lines[n]) for n in (0, -1))
    seconds = {name: value for name, value in last.items() if name.startswith("seconds_")}
    entropy = {"entropy, first": first["entropy"], "entropy, last": last["entropy"]}
    return done | entropy | {"logp_gap_max": last["logp_gap_max"]} | seconds


def _program(*command: str) -> dict[str, Any]:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    if done.returncode:
        print(done.stdout, done.stderr, sep="\n")  # into the part's log
        raise RuntimeError("\n".join(lines[-LOG_LINES:]) + done.stderr[-2000:])
    return {"said": lines[-1] if lines else ""}


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "machine": machine,
    "ceilings": measures.ceilings,
    "exactness": measures.exactness,
    "head": measures.head,
    "attention": measures.attention,
    "handover": measures.handover,
    "tests": tests,
    "example": example,
    "small steps": partial(measures.steps, "small"),
    **{f"{models} steps": partial(measures.steps, models) for models in measures.REAL},
}
ON_GPUS = ("tests", "example", *(f"{models} steps" for models in measures.REAL))
"""Parts that are skipped without one."""


def run_part(name: str, folder: Path, limit_s: float) -> dict[str, Any]:
    """One part in a process of its own: {"seconds", "found"}, {"seconds", "error"}, or all three
    where some of it has failed."""
    begin, log = time.monotonic(), folder / f"{name.replace(' ', '_')}.log"
    result = log.with_suffix(".json")
    result.unlink(missing_ok=True)
    error = ""
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, __file__, "--only", name, "--result", str(result)],
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            code, error = 1, f"not done after {limit_s:.0f} s; "
        finally:  # it has a session of its own, which Ctrl-C does not reach
            with suppress(ProcessLookupError):
                os.killpg(process.pid, 9)
            process.wait()
    seconds = round(time.monotonic() - begin, 1)
    if code or not result.exists():
        last = "\n".join(log.read_text(errors="replace").splitlines()[-LOG_LINES:])
        return {"seconds": seconds, "error": f"{error}{log}:\n{last}"}
    found = json.loads(result.read_text())
    result.unlink()
    if any(what.split(" / ")[-1] == "error" for what, _ in flat(found)):
        return {"seconds": seconds, "found": found, "error": f"in parts; {log}"}
    log.unlink()
    return {"seconds": seconds, "found": found}


def flat(found: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """{"a": {"b": 1}} -> [("a / b", "1")]."""
    rows: list[tuple[str, str]] = []
    for name, value in found.items():
        if isinstance(value, dict):
            rows += flat(value, f"{prefix}{name} / ")
        else:
            said = f"{value:,.4g}" if isinstance(value, float) else str(value)
            rows.append((prefix + name, said))
    return rows


def _seconds(said: str) -> float:
    seconds = float(said)
    if not 5 <= seconds < 1e6:
        raise argparse.ArgumentTypeError(f"expected 5 seconds or more, got {said}")
    return seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help="default: all")
    parser.add_argument("--out", type=Path, default=Path("gpu_check"))
    parser.add_argument("--budget", type=_seconds, default=480.0, help="seconds for all of it")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if unknown := {*arguments.parts} - {*PARTS}:
        parser.error(f"no part {min(unknown)!r}; there are {', '.join(PARTS)}")
    if arguments.only:
        found = PARTS[arguments.only]()
        arguments.result.write_text(json.dumps(found, default=str))
        return 0
    if str(arguments.out) in PARTS:
        parser.error(f"{arguments.out} is a part: name a folder first, then parts")
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "found.json").touch()
    except OSError as error:
        parser.error(f"{arguments.out}: cannot be written: {error.strerror}; name another folder")
    end = time.monotonic() + arguments.budget
    table = Table("part", "", "found", title="tests/gpu/check.sh")
    results: dict[str, Any] = {}
    for name in arguments.parts or PARTS:
        left = end - time.monotonic()
        if name in ON_GPUS and not measures.CUDA:
            result = {"seconds": 0.0, "found": {"skipped": "no GPU"}}
        elif left < 5:
            result = {"seconds": 0.0, "error": "no time left"}
        else:
            result = run_part(name, arguments.out, min(left, DEADLINE_S.get(name, PART_S)))
        results[name] = result
        print(f"{name}: {result['seconds']} s{' FAILED' if 'error' in result else ''}", flush=True)
        rows = flat(result.get("found", {"error": result.get("error", "")}))
        for number, (what, said) in enumerate(rows):
            first = f"{name} ({result['seconds']} s)" if not number else ""
            table.add_row(first, what, said, end_section=number == len(rows) - 1)
        # after every part: whatever ends this process, what was found stays
        (arguments.out / "found.json").write_text(json.dumps(results, indent=1))
    Console(width=110).print(table)
    with (arguments.out / "found.txt").open("w") as file:
        Console(width=110, file=file).print(table)
    return int(any("error" in result for result in results.values()))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("stopped; found.json has what was found before")
