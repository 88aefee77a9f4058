"""Mathematics: the final answer, compared with the label by math-verify.

The answer is the last \\boxed{...} of a response, or what follows its last `Answer:`, whichever
stands later: the forms that Qwen2.5-Math and DAPO-Math-17k's prompts ask for.

Comparing expressions can take sympy for ever.  So it happens in a process of its own
(mathematics_worker.py), which the kernel ends at the deadline; an answer that takes longer is
wrong.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import json
import os
import re
import select
import subprocess
import sys
import threading
import time
from typing import Any

from megatron_gpc.errors import UserError
from megatron_gpc.run.launch import own_search_path

DEADLINE_S = 5.0
"""How long one comparison may take."""
START_S = 120.0
"""How long the process may take until it listens; it imports sympy."""
LONGEST = 500
"""Characters; nothing longer is a final answer."""

_ANSWER = re.compile(r"Answer\s*:[ \t]*([^\n]+)", re.IGNORECASE)
_SPECIAL = re.compile(r"<\|[^|<>]*\|>|</?s>")


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


def verify(text: str, label: Any) -> float:
    """1 where the final answer of `text` is that of `label` (text or number), else 0."""
    answer = final_answer(text)
    if not answer or len(answer) > LONGEST:
        return 0.0
    gold = str(label).strip()
    if answer == gold:
        return 1.0
    return float(_COMPARER.equal(gold, answer))


def final_answer(text: str) -> str | None:
    r"""The last \boxed{...} or `Answer: ...`, whichever stands later; None where neither does.

    >>> final_answer(r"so x = 2.  Answer: $2$<|im_end|>")
    '2'
    >>> final_answer(r"\boxed{1} no, \boxed{\frac{1}{2}}")
    '\\frac{1}{2}'
    """
    text = _SPECIAL.sub("", text)
    boxed = _last_boxed(text)
    stated = None
    for match in _ANSWER.finditer(text):
        stated = match
    if boxed is not None and (stated is None or text.rfind("\\boxed") > stated.start()):
        return boxed.strip()
    return stated[1].strip("* \t").rstrip(".").strip("$ ") if stated else None


def _last_boxed(text: str) -> str | None:
    """What the last \\boxed's braces hold; None where there is none, or it is not closed."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    begin, depth = start + len("\\boxed{"), 1
    for end in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[begin:end]
    return None


class Comparer:
    """The worker process: started when first needed, and again after a deadline ended it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def equal(self, gold: str, answer: str) -> bool:
        """Whether both say the same; False where that cannot be told in DEADLINE_S."""
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._start()
            request = json.dumps([gold, answer, DEADLINE_S]) + "\n"
            with contextlib.suppress(BrokenPipeError):  # then its end is what is read
                self._process.stdin.write(request.encode())
                self._process.stdin.flush()
            # It ends itself at the deadline; the margin is for a machine that is busy.
            said = self._line(2 * DEADLINE_S)
            if said is None:
                self.close()
            return said == b"true\n"

    def close(self) -> None:
        """End the process; does nothing where there is none."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process.stdin.close()
            self._process.stdout.close()
            self._process = None

    def _start(self) -> None:
        self.close()
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "megatron_gpc.rewards.mathematics_worker"],
            env={**os.environ, "PYTHONPATH": own_search_path()},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            process_group=0,  # a terminal's Ctrl-C is for this process; it ends with its input
        )
        if self._line(START_S) != b"ready\n":
            self.close()
            raise UserError(
                f"data.verifier=math: its process did not start within {START_S:g} s; "
                "`python -m megatron_gpc.rewards.mathematics_worker` says why"
            )

    def _line(self, timeout_s: float) -> bytes | None:
        """A line that it says; None where it says none in time, or has ended."""
        stream, said = self._process.stdout, b""
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


_COMPARER = Comparer()
atexit.register(_COMPARER.close)
