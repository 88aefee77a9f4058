"""The verifier `math`: what a step of 512 answers costs, and what hung answers add to it.

    python tools/bench/judge.py [--hung 51]

Ordinary answers are fractions, roots, polynomials, intervals and numbers; hung ones are towers of
powers.  Times depend on the machine: what counts are the ratios of one run.
"""

from __future__ import annotations

import json
import os
import sys
import time

from megatron_gpc.cli import Parser, exit_code
from megatron_gpc.commands.arguments import number
from megatron_gpc.rewards import mathematics
from megatron_gpc.rewards.mathematics import Pool

ANSWERS = 512
KINDS = (
    (r"\frac{%d}{97}", r"\dfrac{%d}{97}"),
    (r"\sqrt{%d}+1", r"1+\sqrt{%d}"),
    ("x^2+%dx+1", "1+%dx+x^{2}"),
    ("[%d, 1000)", r"\left[%d, 1000\right)"),
    (r"%d\pi", r"\pi \cdot %d"),
    ("%d", "%d.0"),
)


def ordinary(count: int) -> list[tuple[str, str]]:
    """(text, label), all different; every fifth answer is wrong."""
    pairs = []
    for i in range(count):
        label, answer = KINDS[i % len(KINDS)]
        pairs.append((rf"so \boxed{{{answer % (i + 2 + (i % 5 == 0))}}}", label % (i + 2)))
    return pairs


def hung(count: int) -> list[tuple[str, str]]:
    return [(rf"\boxed{{9^{{9^{{9^{{{i}}}}}}}}}", "3") for i in range(9, 9 + count)]


def seconds(pairs: list[tuple[str, str]], workers: int) -> float:
    """Of judging all of them, without the workers' start."""
    mathematics._POOL = pool = Pool(workers)
    mathematics.verify_all([(rf"\boxed{{{i}+1}}", "2") for i in range(4 * workers)])
    begin = time.perf_counter()
    mathematics.verify_all(pairs)
    took = time.perf_counter() - begin
    pool.close()
    return took


def main() -> int:
    parser = Parser(description=__doc__.split("\n")[0])
    bounded = number(int, 1, ANSWERS)
    parser.add_argument("--hung", type=bounded, default=51, help=f"of {ANSWERS} (%(default)s)")
    given = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    one = seconds(ordinary(ANSWERS), 1)
    all_cores = seconds(ordinary(ANSWERS), cores)
    four = seconds(hung(4), cores)
    mixed = seconds(ordinary(ANSWERS - given.hung) + hung(given.hung), cores)
    found = {
        "cores": cores,
        "seconds of 512 ordinary, one worker": round(one, 2),
        "ratio, a worker a core": round(all_cores / one, 2),
        "seconds of 4 hung": round(four, 2),
        f"seconds of 512 with {given.hung} hung": round(mixed, 2),
        "of the deadlines' CPU by the cores": round(
            mixed / (given.hung * mathematics.DEADLINE_S / cores), 2
        ),
    }
    print(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
