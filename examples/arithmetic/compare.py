"""Static clipping against ID on the same start, over seeds, in one picture: `make compare`.

    python examples/arithmetic/compare.py [--start start-peaked] [--seeds 0 1 2]
        [--schedules static id] [key=value ...]

The start is the peaked one of build.py unless --start says `start`, the main job's: from there the
policy has so much to learn that entropy falls whatever the thresholds are (README).

Runs go side by side, one process each (TP1 PP1: layouts give the same numbers, and small ones are
faster), as many as there are cores.  A run that is finished is not made again; one that was
interrupted continues.  The picture and the table are written to runs/arithmetic-compare/.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

from megatron_gpc.config_file import load
from megatron_gpc.metrics.plots import plot_runs
from megatron_gpc.metrics.tables import compare_table, print_table
from megatron_gpc.rundir import build_model

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--start", choices=["start", "start-peaked"], default="start-peaked")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--schedules", nargs="+", default=["static", "id"])
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "arithmetic-compare")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_args()

    start_dir = HERE / arguments.start
    overrides = [
        f"model.hf={start_dir}",
        f"model.build={HERE / ('build_peaked.py' if 'peaked' in arguments.start else 'build.py')}",
        f"data.prompts={start_dir}/train.jsonl",
        f"eval.prompts={start_dir}/heldout.jsonl",
        *("parallel.tp=1", "parallel.pp=1"),
        *arguments.overrides,
    ]
    build_model(load(HERE / "config.yaml", overrides))  # once, before runs that would all build it
    waiting = list(product(arguments.seeds, arguments.schedules))
    folders = [arguments.out / f"{schedule}-{seed}" for seed, schedule in waiting]
    running: dict[str, subprocess.Popen[bytes]] = {}
    arguments.out.mkdir(parents=True, exist_ok=True)
    total = len(waiting)
    begin = time.monotonic()
    while waiting or running:
        while waiting and len(running) < (os.cpu_count() or 1):
            seed, schedule = waiting.pop(0)
            name = f"{schedule}-{seed}"
            running[name] = start(arguments.out / name, schedule, seed, overrides)
            print(f"started {name}", flush=True)
        time.sleep(0.5)
        for name in [name for name, process in running.items() if process.poll() is not None]:
            code = running.pop(name).returncode
            if code:
                print((arguments.out / f"{name}.log").read_text()[-3000:], file=sys.stderr)
                for other in running.values():
                    other.terminate()
                return code
            done, seconds = total - len(waiting) - len(running), time.monotonic() - begin
            print(f"{name} done ({done} of {total}, {seconds:.0f} s)", flush=True)
    picture = plot_runs(folders, arguments.out / "comparison.png")
    print_table(compare_table(folders))
    print(f"picture: {picture}")
    return 0


def start(run_dir: Path, schedule: str, seed: int, overrides: list[str]) -> subprocess.Popen[bytes]:
    """One run as a process of its own; its console goes to a file beside its folder."""
    with run_dir.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(
            [
                *(sys.executable, "-m", "megatron_gpc", "train", str(HERE / "config.yaml")),
                *(f"run_dir={run_dir}", f"clip.schedule={schedule}", f"seed={seed}"),
                *overrides,
            ],
            stdout=log,
            stderr=log,
        )


if __name__ == "__main__":
    sys.exit(main())
