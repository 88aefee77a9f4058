"""Mathematics: the final answer, compared with the label by math-verify.

The answer is the last \\boxed{...} of a response, or what follows its last `Answer:`, whichever
stands later: the forms that Qwen2.5-Math and DAPO-Math-17k's prompts ask for (extraction.py).

Comparing expressions can take sympy for ever.  So it happens in processes of its own
(mathematics_worker.py), which the kernel ends at the deadline; an answer that takes longer is
wrong.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import json
import math
import os
import queue
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Any

from megatron_gpc.errors import UserError
from megatron_gpc.rewards.extraction import final_answer, said
from megatron_gpc.run.child import own_search_path

DEADLINE_S = 2.0
"""How long one comparison may compute [s of CPU], so that a busy machine makes none wrong."""
MARGIN = 6
"""By the clock it may take this many times as long."""
START_S = 120.0
"""How long the process may take until it listens; it imports sympy."""
LONGEST = 500
"""Characters; nothing longer is a final answer."""
MOST_WORKERS = 16


def require() -> None:
    """Refuse to go on without the library.

    Raises:
        UserError: says how to install it.
    """
    if importlib.util.find_spec("math_verify") is None:
        raise UserError(
            "data.verifier=math needs math-verify, which is not installed: "
            "pip install 'megatron-gpc[math]'"
        )


def check_label(label: Any) -> None:
    """Raises a ValueError for what is neither text nor a number."""
    text_or_number = isinstance(label, str | int | float) and not isinstance(label, bool)
    if not text_or_number or not str(label).strip():
        raise ValueError("expected the right answer, as text or a number")
    if isinstance(label, float) and not math.isfinite(label):
        raise ValueError("expected a finite number")


def verify_all(pairs: Sequence[tuple[str, Any]]) -> list[float]:
    """For each (text, label): 1 if the final answer of the text is the label, else 0."""
    asked = []
    for text, label in pairs:
        answer = final_answer(said(text))
        usable = bool(answer) and len(answer) <= LONGEST
        asked.append((str(label).strip(), answer) if usable else None)
    unknown = {pair for pair in asked if pair is not None and pair[0] != pair[1]}
    known = _POOL.equal(sorted(unknown))
    return [float(pair is not None and known.get(pair, True)) for pair in asked]


class Pool:
    """Worker processes, each started when first needed; threads of any number may ask."""

    def __init__(self, size: int) -> None:
        self._idle: queue.LifoQueue[Comparer] = queue.LifoQueue()
        self._all = [Comparer() for _ in range(size)]
        for comparer in reversed(self._all):
            self._idle.put(comparer)

    def equal(self, pairs: Sequence[tuple[str, str]]) -> dict[tuple[str, str], bool]:
        """For each (gold, answer), whether both say the same."""
        if len(pairs) < 2:
            return {pair: self._one(pair) for pair in pairs}
        with ThreadPoolExecutor(min(len(self._all), len(pairs))) as threads:
            return dict(zip(pairs, threads.map(self._one, pairs), strict=True))

    def _one(self, pair: tuple[str, str]) -> bool:
        comparer = self._idle.get()
        try:
            return comparer.equal(*pair)
        finally:
            self._idle.put(comparer)

    def close(self) -> None:
        """End the processes."""
        for comparer in self._all:
            comparer.close()


class Comparer:
    """A worker process, for one thread at a time: started when first needed or if it has ended."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def equal(self, gold: str, answer: str) -> bool:
        """Whether both say the same; False if that cannot be told in DEADLINE_S."""
        process = self._process
        if process is None or process.poll() is not None:
            process = self._start()
        request = json.dumps([gold, answer, DEADLINE_S]) + "\n"
        with contextlib.suppress(BrokenPipeError):  # then its end is what is read
            _pipe(process.stdin).write(request.encode())
        said = _line(process, MARGIN * DEADLINE_S)  # it ends itself at the deadline
        if said is None:
            self.close()
        return said == b"true\n"

    def close(self) -> None:
        """End the process; does nothing if there is none."""
        if self._process is not None:
            with self._process as process:  # which waits for its end, and closes the pipes
                process.kill()
            self._process = None

    def _start(self) -> subprocess.Popen[bytes]:
        self.close()
        self._process = process = subprocess.Popen(
            [sys.executable, "-P", "-m", "megatron_gpc.rewards.mathematics_worker"],
            env={**os.environ, "PYTHONPATH": own_search_path()},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            process_group=0,  # a terminal's Ctrl-C is for this process; it ends with its input
        )
        if _line(process, START_S) != b"ready\n":
            self.close()
            raise UserError(
                f"data.verifier=math: its process did not start within {START_S:g} s; "
                "`python -m megatron_gpc.rewards.mathematics_worker` says why"
            )
        return process


def _line(process: subprocess.Popen[bytes], timeout_s: float) -> bytes | None:
    """A line that the process says; None if it says none in time, or has ended."""
    stream, said = _pipe(process.stdout), b""
    deadline = time.monotonic() + timeout_s
    while not said.endswith(b"\n"):
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([stream], [], [], left)[0]:
            return None
        piece = stream.read(64)
        if not piece:
            return None
        said += piece
    return said


def _pipe(stream: IO[bytes] | None) -> IO[bytes]:
    assert stream is not None  # Popen was asked for it
    return stream


_POOL = Pool(min(max(len(os.sched_getaffinity(0)), 2), MOST_WORKERS))
atexit.register(_POOL.close)
