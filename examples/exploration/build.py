"""Make the example's starting point: a tiny Qwen2 that writes digits at random, and its prompts.

    python build.py OUT

The task: given `426=`, write 16 digits.  The middle digit says what is asked (reward.py): below 5
luck decides, from 5 on the first digit must occur at least five times, which the start manages in 2
of 1,000 answers.

OUT becomes what examples/digits.py says.  Of the thousand prompts 200 are held out;
heldout.jsonl has the first 40 of them that are hard, heldout_easy.jsonl the first 40 that are easy.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1]))  # for what examples share
from digits import make_start, ranked_digits  # noqa: E402
from reward import is_hard  # noqa: E402

EVALUATED = 40


def by_kind(held_out: torch.Tensor) -> dict[str, torch.Tensor]:
    """The files of prompts that are evaluated."""
    hard = torch.tensor([is_hard(prompt) for prompt in held_out.tolist()])
    return {
        "heldout": held_out[hard][:EVALUATED],
        "heldout_easy": held_out[~hard][:EVALUATED],
    }


def main() -> int:
    return make_start(__doc__, 3, held_out=200, distribution=ranked_digits, evaluated=by_kind)


if __name__ == "__main__":
    sys.exit(main())
