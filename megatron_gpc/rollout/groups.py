"""Groups, the samples of one prompt each, and which of them a training step gets.

- plainly, the first `prompts_per_step` in prompt order: the same at every repetition;
- rollout.filter=mixed drops groups that are all right or all wrong (no gradient) and asks for the
  next prompts instead (DAPO's dynamic sampling), up to rollout.refill_limit times as many;
- rollout.oversample > 1 asks for more than needed and takes those that end first.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from typing import Literal

import torch

from megatron_gpc.config import RolloutConfig
from megatron_gpc.types import Prompt, Sample


@dataclasses.dataclass(eq=False)
class Group:
    """The samples of one prompt, in the making."""

    position: int
    """In the prompt source; of a held-out prompt its index."""
    prompt: Prompt
    samples: list[Sample]
    """By sample_index.  `abort` as finish reason: not finished, and may be empty."""
    ended: bool = False

    @property
    def verdict(self) -> Literal["mixed", "right", "wrong"]:
        """Whether all of its answers are right, or wrong; a penalty for length plays no part."""
        right = {sample.right for sample in self.samples}
        if len(right) > 1:
            return "mixed"
        return "right" if right.pop() else "wrong"

    def unfinished(self) -> list[Sample]:
        return [sample for sample in self.samples if sample.finish_reason == "abort"]


def blanks(prompt: Prompt, count: int) -> list[Sample]:
    """Samples of which nothing has been made yet."""
    return [Sample(prompt, index, (), (), "", "abort", ()) for index in range(count)]


@dataclasses.dataclass
class Rollout:
    """What one training step is made of."""

    samples: list[Sample]
    """group_size of every prompt, prompt by prompt."""
    positions: list[int]
    """Of the prompts in the source, one a group."""
    metrics: dict[str, float]

    def rewards(self) -> torch.Tensor:
        """Of each sample, [N] fp32."""
        return torch.tensor([sample.reward for sample in self.samples])

    def groups(self) -> torch.Tensor:
        """Which group each sample is of, counted from 0, [N] int64."""
        return torch.arange(len(self.samples)) // (len(self.samples) // len(self.positions))


class Choice:
    """The groups of one training step: how many to ask for, and which to take.

    Args:
        rollout: how to choose.
    """

    def __init__(self, rollout: RolloutConfig):
        self.rollout, self.wanted = rollout, rollout.prompts_per_step
        self.first = math.ceil(self.wanted * rollout.oversample)
        """Groups to ask for at first."""
        self.most = max(self.first, math.floor(self.wanted * rollout.refill_limit))
        """Groups to ask for in all."""

    def missing(self, groups: Sequence[Group], ended: Sequence[Group]) -> int:
        """How many more to ask for, in place of ended ones that are of no use."""
        dropped = sum(not self._accepts(group) for group in ended)
        return min(self.first + dropped, self.most) - len(groups)

    def made(self, groups: Sequence[Group], ended: Sequence[Group]) -> list[Group] | None:
        """The step's groups, once they are known.

        Args:
            groups: in the order in which they were asked for.
            ended: in the order in which they ended.
        """
        if self.rollout.oversample > 1:
            accepted = [group for group in ended if self._accepts(group)]
        else:  # in prompt order, and only as far as all before have ended: timing plays no part
            accepted = []
            for group in groups:
                if not group.ended:
                    break
                accepted += [group] if self._accepts(group) else []
        if len(accepted) < self.wanted:
            return None
        return _in_order(accepted[: self.wanted])

    def filled_up(self, ended: Sequence[Group]) -> list[Group]:
        """The step's groups if the limit is reached: uniform ones fill up the batch."""
        by_use = sorted(ended, key=lambda g: (not self._accepts(g), g.position))
        return _in_order(by_use[: self.wanted])

    def unused(self, groups: Sequence[Group], chosen: Sequence[Group]) -> list[Group]:
        """Those not done with: neither trained on nor dropped for being uniform."""
        taken = set(chosen)
        if self.rollout.oversample > 1:
            dropped = {g for g in groups if g.ended and not self._accepts(g)}
        else:
            # How much was asked for beyond the last chosen group is chance: it is asked for again.
            last = max(i for i, group in enumerate(groups) if group in taken)
            dropped = set(groups[:last])
        return [group for group in groups if group not in taken | dropped]

    def _accepts(self, group: Group) -> bool:
        return self.rollout.filter == "none" or group.verdict == "mixed"


def _in_order(groups: Sequence[Group]) -> list[Group]:
    return sorted(groups, key=lambda group: group.position)


def newest_version(samples: Sequence[Sample]) -> int:
    """Of the weights that made some token of the samples."""
    return max(int(v) for s in samples for v, _, _ in s.weight_versions)


def rollout_metrics(
    samples: Sequence[Sample], ended: Sequence[Group], step: int
) -> dict[str, float]:
    """What is to be said of a training step's samples.

    Args:
        ended: all groups that ended, chosen or not.
    """
    tokens_of_age: Counter[int] = Counter()
    for sample in samples:
        for version, start, end in sample.weight_versions:
            tokens_of_age[step - 1 - int(version)] += end - start
    aged = sum(age * tokens for age, tokens in tokens_of_age.items())
    verdicts = Counter(group.verdict for group in ended)
    return {
        "weight_version": newest_version(samples),
        "groups_all_right": verdicts["right"] / len(ended),
        "groups_all_wrong": verdicts["wrong"] / len(ended),
        "groups_asked": float(len(ended)),
        "truncated": sum(s.finish_reason == "length" for s in samples) / len(samples),
        "staleness_mean": aged / tokens_of_age.total(),
        "staleness_max": float(max(tokens_of_age)),
    }
