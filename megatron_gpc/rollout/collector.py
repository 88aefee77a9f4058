"""What rank 0 does between two updates: hand over weights, sample, judge."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_gpc.config import Config
from megatron_gpc.rewards import Verifier
from megatron_gpc.rollout.client import Generation, Request, RolloutError, SGLangClient
from megatron_gpc.types import Prompt, Sample


def sample_seed(run_seed: int, stream: str, prompt_index: int, sample_index: int) -> int:
    """Seed of one sample, 0 <= seed < 2^31.

    It follows from these four alone, so a rollout does not depend on the trainer's layout, nor on
    what else is sampled at the same time.

    Args:
        stream: keeps uses apart: `step 12`, `eval`.
    """
    text = f"{run_seed}/{stream}/{prompt_index}/{sample_index}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big") >> 1


class Collector:
    """Groups of judged samples from a rollout server."""

    def __init__(
        self,
        config: Config,
        url: str,
        verifier: Verifier,
        decode: Callable[[Sequence[int]], str],
        stop_token_ids: Sequence[int],
    ):
        """Args:
        decode: response tokens -> text, special tokens kept: whether an answer was ended is
            for the verifier to judge, and servers differ in what they trim.
        """
        self.config = config
        self.verifier = verifier
        self.decode = decode
        self.stop_token_ids = list(stop_token_ids)
        server = config.rollout.server
        self.client = SGLangClient(
            url,
            timeout_s=server.request_timeout_s,
            retries=server.retries,
            max_in_flight=server.max_in_flight,
        )
        self._loop = asyncio.Runner()

    def close(self) -> None:
        self._loop.run(self.client.close())
        self._loop.close()

    def hand_over(self, folder: Path, tensors: dict[str, Any] | None, version: int) -> None:
        """Give the server new weights: from `folder`, or inside the request.

        Raises:
            RolloutError: the server did not take them, or answers with another version.
        """
        self._loop.run(self._hand_over(folder, tensors, str(version)))

    async def _hand_over(self, folder: Path, tensors: dict[str, Any] | None, version: str) -> None:
        if tensors is None:
            await self.client.update_weights_from_disk(str(folder), version)
        else:
            await self.client.begin_weight_update()
            await self.client.update_weights_from_tensor(list(tensors.items()), version)
            await self.client.end_weight_update()
        info = await self.client.model_info()
        if info["weight_version"] != version:
            raise RolloutError(
                f"the server reports weight version {info['weight_version']!r} after "
                f"it was given {version!r}"
            )

    def sample(self, prompts: Sequence[Prompt], group_size: int, stream: str) -> list[Sample]:
        """`group_size` judged samples of every prompt, prompt by prompt.

        Args:
            stream: see `sample_seed`.

        Raises:
            RolloutError: the server failed beyond the configured retries.
        """
        requests, owners = [], []
        for prompt in prompts:
            for index in range(group_size):
                owners.append((prompt, index))
                requests.append(
                    Request(
                        list(prompt.token_ids),
                        {
                            "temperature": self.config.rollout.temperature,
                            "max_new_tokens": self.config.rollout.max_response_tokens,
                            "stop_token_ids": self.stop_token_ids,
                            "sampling_seed": sample_seed(
                                self.config.seed, stream, prompt.index, index
                            ),
                        },
                    )
                )
        generations = self._loop.run(self.client.generate_many(requests))
        return [
            self._judged(prompt, index, generation)
            for (prompt, index), generation in zip(owners, generations, strict=True)
        ]

    def _judged(self, prompt: Prompt, index: int, generation: Generation) -> Sample:
        sample = Sample(
            prompt,
            index,
            tuple(generation.token_ids),
            tuple(generation.logprobs),
            self.decode(generation.token_ids),
            generation.finish_reason,
            generation.weight_version,
        )
        return sample.judged(self.verifier(sample.text, prompt.label))


def distinct_right(samples: Sequence[Sample], group_size: int) -> float:
    """Mean over prompts of how many different right answers their samples gave."""
    groups = [samples[i : i + group_size] for i in range(0, len(samples), group_size)]
    return sum(len({s.text for s in group if s.reward > 0}) for group in groups) / len(groups)
