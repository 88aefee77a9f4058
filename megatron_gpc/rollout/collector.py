"""From prompts to judged groups: what is asked for, refilled, aborted and given back.

Groups are asked for as others end, so no batch waits for its slowest sample before the next is
sent; rollout/groups.py says which of them a training step gets.  Those that still run then are
aborted; their prompts come back next, with rollout.partial from where they were.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from megatron_gpc.config import Config, RolloutConfig
from megatron_gpc.engines.answers import Generation
from megatron_gpc.engines.client import SampleRequest
from megatron_gpc.engines.fleet import Fleet
from megatron_gpc.engines.probe import probe_size
from megatron_gpc.rewards.judging import Answer
from megatron_gpc.rollout.evaluation import score_means
from megatron_gpc.rollout.groups import Choice, Group, Rollout, blanks, rollout_metrics
from megatron_gpc.rollout.prompts import PromptSource, refuse_changed
from megatron_gpc.types import Experts, Prompt, Sample, Verdict, joined


def sample_seed(run_seed: int, stream: str, position: int, sample_index: int) -> int:
    """Seed of one sample, 0 <= seed < 2^31.

    It follows from these four alone, so a rollout does not depend on the trainer's layout, nor on
    what else is sampled at the same time.

    Args:
        stream: keeps uses apart: `step 12`, `eval`.
        position: of the prompt in the prompt source.  Not the prompt itself: a step may have one
            twice, and the second is to be answered anew.
    """
    text = f"{run_seed}/{stream}/{position}/{sample_index}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big") >> 1


class Collector:
    """Groups of judged samples for training steps and evaluations.

    Args:
        config: the run.
        engines: where samples come from.
        source: training prompts.
        judge: (text, prompt) of some answers -> their verdicts; may take long.
        decode: response tokens -> text, special tokens kept: whether an answer was ended is for the
            verifier to judge, and servers differ in what they trim.
        stop_token_ids: tokens that end a response.
        sampling: further sampling parameters, in SGLang's names.
        experts: of the model, if samples are to tell which of them their tokens went to.
    """

    def __init__(
        self,
        config: Config,
        engines: Fleet,
        source: PromptSource,
        judge: Callable[[Sequence[Answer]], list[Verdict]],
        decode: Callable[[Sequence[int]], str],
        stop_token_ids: Sequence[int],
        sampling: Mapping[str, Any] = MappingProxyType({}),
        experts: Experts | None = None,
    ):
        self.config, self.engines, self.source = config, engines, source
        self.judge, self.decode = judge, decode
        self.stop_token_ids, self.sampling = list(stop_token_ids), sampling
        self.experts = experts
        self.unfinished: dict[int, list[Sample]] = {}
        """Position -> samples of an aborted group that go on in the next step (rollout.partial)."""

    # ---- state ----

    def state(self) -> dict[str, Any]:
        """Everything that the next step depends on, as plain values."""
        unfinished = {
            position: [dataclasses.asdict(sample) for sample in samples]
            for position, samples in self.unfinished.items()
        }
        return {"source": self.source.state(), "unfinished": unfinished, **self._made_of()}

    def restore(self, state: dict[str, Any]) -> bool:
        """Continue where `state` was taken.

        Returns:
            Whether what was sampled then, for steps to come, is what would be sampled now.  Where
            it is not, it is made anew.

        Raises:
            UserError: the prompts are others, and data.changed does not allow that.
        """
        made_of = self._made_of()
        # what older checkpoints do not know is taken to be as it was, but for routes
        before = {**made_of, "routes": False, **state}
        changed = [key for key, value in made_of.items() if before[key] != value]
        refuse_changed(self.source, state.get("prompts"), self.config.data)
        self.source.restore(state["source"])
        if not changed:
            self.unfinished = {
                position: [Sample.from_plain(values) for values in samples]
                for position, samples in state["unfinished"].items()
            }
        return not changed

    def _made_of(self) -> dict[str, Any]:
        """What unfinished samples, and those made ahead, were made of besides the weights."""
        rollout = self.config.rollout
        settings = ("group_size", "prompts_per_step", "max_response_tokens", "temperature")
        return {
            "prompts": self.source.digest,
            "seed": self.config.seed,
            "verifier": self.config.data.verifier,
            "verifier_arguments": self.config.data.verifier_arguments,
            "routes": self.experts is not None,
            **{name: getattr(rollout, name) for name in settings},
        }

    # ---- a training step ----

    async def collect(self, step: int) -> Rollout:
        """The groups of a training step; on the engines' loop.

        Raises:
            RolloutError: see Fleet.generate.  Everything taken has been given back by then.
        """
        stream, choice = f"step {step}", Choice(self.config.rollout)
        counts: Counter[str] = Counter()
        groups: list[Group] = []  # in the order in which they were asked for
        ended: list[Group] = []  # in the order in which they ended
        running: dict[asyncio.Task[None], list[Group]] = {}
        chosen: list[Group] | None = None
        try:
            while chosen is None:
                positions = self.source.take(choice.missing(groups, ended))
                new = [self._group(position, counts) for position in positions]
                groups += new
                for part in self._parts(new):
                    running[asyncio.create_task(self._fill(part, stream))] = part
                if running:
                    done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                    for task in done:
                        task.result()
                        ended += running.pop(task)
                    chosen = choice.made(groups, ended)
                else:  # no more may be asked for
                    chosen = choice.filled_up(ended)
        except BaseException:
            for task in running:
                task.cancel()
            self._give_back(groups)
            raise
        await self._end_stragglers(running, stream)
        aborted = sum(len(group.unfinished()) for part in running.values() for group in part)
        self._give_back(choice.unused(groups, chosen))
        samples = [sample for group in chosen for sample in group.samples]
        metrics = {
            **rollout_metrics(samples, ended, step),
            "groups_too_old": float(counts["groups_too_old"]),
            "samples_aborted": float(aborted),
            **score_means(samples, "reward_"),
            **{name: float(count) for name, count in self.engines.counts.items()},
        }
        return Rollout(samples, [group.position for group in chosen], metrics)

    def _group(self, position: int, counts: Counter[str]) -> Group:
        """A group to be asked for: a new one, or one that was aborted and is not too old."""
        prompt = self.source.at(position)
        kept = self.unfinished.pop(position, None)
        if kept is not None and self._too_old(kept):
            counts["groups_too_old"] += 1
            kept = None
        if kept is None:
            kept = blanks(prompt, self.config.rollout.group_size)
        return Group(position, prompt, kept)

    def _too_old(self, samples: Sequence[Sample]) -> bool:
        oldest = min((int(v) for s in samples for v, _, _ in s.weight_versions), default=None)
        if oldest is None or self.engines.version is None:
            return False
        return int(self.engines.version) - oldest > self.config.rollout.max_staleness

    def _parts(self, groups: Sequence[Group]) -> list[list[Group]]:
        """What is asked for in one request.

        The embedded server's numbers depend, in their last bit, on what is computed beside them:
        it gets everything at once, so that a repetition gives the same bits.  SGLang, whose batches
        follow the clock anyway, gets a request a group and refills as they end.
        """
        size, rollout = 1, self.config.rollout
        embedded = rollout.server.kind == "embedded" and not rollout.server.urls
        if embedded and rollout.oversample == 1:
            engines = max(len(self.engines.ready()), 1)
            room = rollout.server.max_in_flight // rollout.group_size
            size = max(min(math.ceil(len(groups) / engines), room), 1)
        return [list(groups[i : i + size]) for i in range(0, len(groups), size)]

    async def _fill(self, groups: Sequence[Group], stream: str) -> None:
        """Finish the unfinished samples of some groups, in one request."""
        owners = [(group, sample) for group in groups for sample in group.unfinished()]
        requests = [self._request(group.position, sample, stream) for group, sample in owners]
        generations = await self.engines.generate(requests)

        def judge() -> list[Sample]:
            pairs = zip(owners, generations, strict=True)
            return self._judged(
                [self._extended(sample, generation) for (_, sample), generation in pairs]
            )

        # In a thread: a verifier may take seconds, and engines are to be heard meanwhile.
        for (group, sample), extended in zip(owners, await asyncio.to_thread(judge), strict=True):
            group.samples[sample.sample_index] = extended
        for group in groups:
            group.ended = not group.unfinished()

    def _request(self, position: int, sample: Sample, stream: str) -> SampleRequest:
        """For what is still missing of a sample."""
        rollout, made = self.config.rollout, len(sample.token_ids)
        return SampleRequest(
            [*sample.prompt.token_ids, *sample.token_ids],
            {
                **self.sampling,
                "temperature": rollout.temperature,
                "max_new_tokens": rollout.max_response_tokens - made,
                "stop_token_ids": self.stop_token_ids,
                "sampling_seed": sample_seed(
                    self.config.seed, stream, position, sample.sample_index
                ),
            },
            rid=f"{_rid_prefix(stream)}{position}-{sample.sample_index}",
            experts=self.experts,
        )

    def _extended(self, sample: Sample, generation: Generation) -> Sample:
        """A sample with what was generated now."""
        made = len(sample.token_ids)
        new = (
            (version, made + start, made + end)
            for version, start, end in generation.weight_versions
        )
        tokens = sample.token_ids + tuple(generation.token_ids)
        text = self.decode(tokens)
        return dataclasses.replace(
            sample,
            token_ids=tokens,
            logprobs=sample.logprobs + tuple(generation.logprobs),
            text=text,
            finish_reason=generation.finish_reason,
            weight_versions=joined([*sample.weight_versions, *new]),
            # a token's are those of the weights that it, or the one after it, was drawn with
            routes=sample.routes + generation.routes[len(sample.routes) :],
        )

    def _judged(self, samples: Sequence[Sample]) -> list[Sample]:
        """The same samples, with the rewards of those that are finished."""
        finished = [sample for sample in samples if sample.finish_reason != "abort"]
        verdicts = iter(self.judge([(sample.text, sample.prompt) for sample in finished]))
        return [
            sample
            if sample.finish_reason == "abort"
            else sample.judged(next(verdicts), self._penalty(sample))
            for sample in samples
        ]

    def _penalty(self, sample: Sample) -> float:
        rollout = self.config.rollout
        if rollout.overlong != "penalty":
            return 0.0
        return overlong_penalty(len(sample.token_ids), rollout)

    async def _end_stragglers(
        self, running: dict[asyncio.Task[None], list[Group]], stream: str
    ) -> None:
        """Abort what still runs, and wait for what has been made of it."""
        if not running:
            return
        await self.engines.abort(_rid_prefix(stream))
        timeout_s = self.config.rollout.server.request_timeout_s
        done, late = await asyncio.wait(running, timeout=timeout_s)
        for task in late:
            task.cancel()
        for task in done:
            task.exception()  # a straggler that failed is a straggler: it is made anew

    def _give_back(self, groups: Sequence[Group]) -> None:
        self.source.give_back(group.position for group in groups)
        if self.config.rollout.partial:
            for group in groups:
                if any(sample.token_ids for sample in group.samples):
                    self.unfinished[group.position] = group.samples

    # ---- an evaluation, a probe ----

    async def probe(self) -> list[Sample]:
        """Some tokens of every ready engine, one after another, from the first training prompt.

        Whatever ends an answer is ignored: the number of tokens is what counts.
        """
        prompt, rollout = self.source.at(0), self.config.rollout
        count, length = probe_size(rollout.server.probe_tokens, rollout.max_response_tokens)
        empty = blanks(prompt, count)
        requests = [self._request(0, sample, "probe") for sample in empty]
        for request in requests:
            request.sampling_params.update(
                max_new_tokens=length, ignore_eos=True, stop=[], stop_token_ids=[]
            )
        found = await self.engines.ask_each(requests)
        return [
            self._extended(empty[number % count], generation)
            for number, generation in enumerate(found)
        ]

    async def sample(self, prompts: Sequence[Prompt], count: int, stream: str) -> list[Sample]:
        """`count` judged samples of every prompt, prompt by prompt; nothing is filtered.

        Args:
            prompts: held-out ones, with indices of their own.
        """
        groups = [Group(prompt.index, prompt, blanks(prompt, count)) for prompt in prompts]
        await asyncio.gather(*(self._fill(part, stream) for part in self._parts(groups)))
        return [sample for group in groups for sample in group.samples]


def overlong_penalty(length: int, rollout: RolloutConfig) -> float:
    """What a response of `length` tokens loses: 0 up to the buffer, then up to 1 (DAPO, eq. 13).

    >>> overlong_penalty(240, RolloutConfig(max_response_tokens=256, overlong_buffer=64))
    0.75
    """
    begin = rollout.max_response_tokens - rollout.overlong_buffer
    return min(max((length - begin) / rollout.overlong_buffer, 0.0), 1.0)


def _rid_prefix(stream: str) -> str:
    """What the ids of a stream's requests begin with; no other stream's do."""
    return f"{stream.replace(' ', '-')}-"
