"""Compares answers for mathematics.py, a line of JSON each.

[gold, answer, deadline in seconds] -> true or false.

It never outlives its parent: it ends with its input, and a comparison that hangs is ended by the
alarm, which nothing in Python has to answer to.
"""

from __future__ import annotations

import json
import logging
import resource
import signal
import sys

from math_verify import parse, verify

MEMORY_BYTES = 4 * 2**30
"""A power tower wants all there is."""


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    logging.disable()  # what cannot be parsed is wrong, and not worth a line of log each
    print("ready", flush=True)
    for line in sys.stdin:
        gold, answer, deadline_s = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, deadline_s)
        equal = verify(_expression(gold), _expression(answer), timeout_seconds=None)
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(bool(equal)), flush=True)


def _expression(text: str) -> list:
    """As LaTeX; its own deadlines, which raise in this thread, give way to the alarm."""
    return parse(f"\\boxed{{{text}}}", parsing_timeout=None)


if __name__ == "__main__":
    main()
