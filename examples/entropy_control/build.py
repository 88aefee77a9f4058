"""Make the example's starting point: a tiny Qwen2 that writes digits at random, and its prompts.

    python build.py OUT

The task: given `47=`, write 16 digits that end in 4 and whose sum is odd, as 7 is.  The ending can
be learned.  Whether 16 digits add up to an even or an odd number is luck to a policy of this size.

OUT becomes what examples/digits.py says, with train.jsonl and heldout.jsonl: ten of the hundred
prompts are held out.  The start draws each digit with P ~ 0.3^rank, and the last one is right half
of the time besides.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch.nn.functional import one_hot

sys.path.append(str(Path(__file__).parents[1]))  # for what examples share
from digits import END, make_start, ranked_digits  # noqa: E402


def distributions(prompts: torch.Tensor) -> torch.Tensor:
    """What the policy learns to draw from: prompts [B, 2] -> probabilities [B, 16, 12]."""
    chances = ranked_digits(prompts)
    chances[:, -1] = (chances[:, -1] + one_hot(prompts[:, 0], END + 1)) / 2
    return chances


def main() -> int:
    return make_start(__doc__, digits=2, held_out=10, distribution=distributions)


if __name__ == "__main__":
    sys.exit(main())
