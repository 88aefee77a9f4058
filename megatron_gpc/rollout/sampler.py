"""Where samples come from: engines, prompts and the verifier behind one object.

`Sampler` has what evaluating needs; `TrainingSampler` adds training's prompts, what is made ahead,
and the policy's weights.  rollout/replay.py has the samples of an earlier run instead, behind the
same methods.  One process has a sampler; all is called on its main thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch

from megatron_gpc.config import Config, RolloutConfig
from megatron_gpc.engines.colocation import Colocation
from megatron_gpc.engines.fleet import Fleet, WeightsNeeded, name_of
from megatron_gpc.engines.probe import Tolerance
from megatron_gpc.engines.starter import Starter, sglang_of
from megatron_gpc.engines.weight_sync import make_sync, read_folder
from megatron_gpc.rewards.judging import Judge
from megatron_gpc.rollout.collector import Collector
from megatron_gpc.rollout.evaluation import as_evaluated, evaluation_metrics, nucleus
from megatron_gpc.rollout.groups import Rollout
from megatron_gpc.rollout.prefetch import Prefetch
from megatron_gpc.rollout.prompt_reader import PromptReader
from megatron_gpc.rollout.prompts import PromptSource
from megatron_gpc.rollout.replay import Replay
from megatron_gpc.rollout.tokenizer import special_tokens
from megatron_gpc.run.say import say
from megatron_gpc.types import Experts, Prompt, Sample
from megatron_gpc.weights import carry_over, check_weights, replayed_experts, write_single
from megatron_gpc.weights.convert import hf_tensors
from megatron_gpc.weights.folders import hf_folder, is_converted
from megatron_gpc.weights.megatron_files import MegatronReader


class Sampler:
    """Judged samples of the held-out prompts.

    Args:
        config: the run.
        fleet: being started.
        reader: of the model that they start from.

    Raises:
        UserError: prompts or verifier cannot be used.
    """

    def __init__(self, config: Config, fleet: Fleet, reader: PromptReader):
        self.config, self.fleet, self.reader = config, fleet, reader
        self.judge = Judge(config.data, special_tokens(reader.tokenizer))
        say(reader.stops.said)
        self.held_out = reader.held_out()
        self.evaluator = self.collector_of(as_evaluated(config), self.held_out, nucleus(config))

    def collector_of(
        self,
        config: Config,
        prompts: list[Prompt],
        sampling: Mapping[str, Any],
        experts: Experts | None = None,
    ) -> Collector:
        """What asks the engines about some prompts.

        Args:
            sampling: parameters besides those of `config.rollout`, in SGLang's names.
            experts: see Collector.
        """
        decode: Any = self.reader.tokenizer.decode  # declared to give a list as well
        return Collector(
            config,
            self.fleet,
            PromptSource(prompts, config.seed),
            self.judge,
            decode,
            self.reader.stops.token_ids,
            {**self.reader.stops.sampling, **sampling},
            experts,
        )

    def read_weights(self, folder: Path, version: str) -> None:
        """Have every engine read a folder, as after an update; those started from it read it again,
        which tells that they can.

        Raises:
            ServerUnavailable: none did; says what was wrong with each.
        """
        self.fleet.await_started()
        read_folder(self.fleet, folder, name_of(version))
        if not self.fleet.ready():
            raise self.fleet.lost(f"no engine has taken the weights of {folder}")

    def held_out_samples(self, prompts: Sequence[Prompt]) -> list[Sample]:
        """eval.samples judged samples of each, prompt by prompt.

        Raises:
            WeightsNeeded: engines live, but have missed weights.
            RolloutError: the engines failed beyond what is configured.
        """
        return self.fleet.run(self.evaluator.sample(prompts, self.config.eval.samples, "eval"))


class TrainingSampler(Sampler):
    """Judged samples for training steps and for their evaluations, made by the policy's weights.

    Once it is made all engines are up.

    Args:
        weights: folder through which engines get weights with rollout.server.sync=disk.

    Raises:
        ServerError, RolloutError: an engine did not start or does not answer.
        UserError: training needs to know where tokens were routed, and an engine does not tell.
    """

    takes_weights = True

    def __init__(self, config: Config, fleet: Fleet, reader: PromptReader, weights: Path):
        files = filter(None, (config.data.prompts, config.eval.prompts))
        say(f"reading prompts: {', '.join(map(str, files))}")
        super().__init__(config, fleet, reader)
        experts = replayed_experts(config)
        self.collector = self.collector_of(config, reader.training(), {}, experts)
        self.colocated = config.rollout.server.colocated
        """Whether engines and policy take turns on the GPUs."""
        self._ahead = Prefetch(fleet, self.collector)
        self._turns = Colocation(fleet)
        self._sync = make_sync(config.rollout.server, fleet, weights)
        self._tolerance = Tolerance.of(config)
        # Before the policy is built: engines take their share of what memory a GPU has left, and on
        # one that the policy takes meanwhile nothing may be left.
        fleet.await_started()
        if experts is not None:
            fleet.check_routes()
        if self.colocated:
            self.rest()

    def close(self) -> None:
        """Leave the group that weights are sent through."""
        self._sync.close()

    # ---- state ----

    def begin(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken (empty: at the first prompt).

        Raises:
            UserError: the prompts are not those of the run, or it is the state of something else.
        """
        if state:
            self._ahead.restore(state)

    def state(self) -> dict[str, Any]:
        """What the next steps' samples depend on; waits for those that are being made."""
        return self._ahead.state()

    # ---- samples ----

    def start(self, step: int) -> None:
        """Begin to sample for a training step, unless it is beyond the last."""
        if step <= self.config.train.steps:
            self._ahead.start(step)

    def collect(self, step: int) -> Rollout | None:
        """The judged samples of a training step; None: the engines need the weights first.

        Raises:
            RolloutError: the engines failed beyond what is configured.
        """
        return self._ahead.result(step)

    def evaluate(self, step: int) -> dict[str, float] | None:
        """What is to be said of the held-out prompts after `step` finished steps: before the first,
        after the last, and every eval.every steps, empty otherwise.

        None: it is due, but the engines need the weights first.
        """
        wanted = self.config.eval
        due = step in (0, self.config.train.steps) or (
            wanted.every > 0 and step % wanted.every == 0
        )
        if not due or not self.held_out:
            return {}
        say(f"step {step}: evaluating {len(self.held_out)} x {wanted.samples} held-out samples")
        try:
            return evaluation_metrics(self.held_out_samples(self.held_out), wanted)
        except WeightsNeeded:
            return None

    # ---- weights ----

    def take_weights(self, tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Hand the policy's weights to the engines.

        Raises:
            ServerUnavailable: no engine answers in time.
            UserError: the shared folder cannot be written.
        """
        if self.colocated:
            self._turns.take_weights()
        self.fleet.await_alive()
        self._sync.push(tensors, name_of(str(version)))
        if self.colocated:
            self._turns.take_cache()

    def probe(self) -> list[Sample]:
        """A few tokens of every engine that has the weights; empty with probe_tokens=0."""
        if not self.fleet.ready() or self.config.rollout.server.probe_tokens == 0:
            return []
        return self.fleet.run(self.collector.probe())

    def convinced(self, gaps: Sequence[Sequence[float]]) -> bool:
        """Whether an engine has the weights and answers as the policy would; one that does not is
        taken out.

        Args:
            gaps: for each sample of the last `probe` the difference of every token [nats].
        """
        if self.config.rollout.server.probe_tokens == 0:
            return bool(self.fleet.ready())
        return bool(gaps) and self.fleet.check_probe(gaps, self._tolerance)

    def give_up(self, version: int) -> None:
        """End the run: engines have not taken the weights.

        Raises:
            ServerUnavailable: says what was wrong with each.
        """
        raise self.fleet.lost(f"weights {version} could not be handed over")

    def rest(self) -> None:
        """Colocated engines give up their memory; the policy trains next."""
        self._turns.rest()


@contextmanager
def fleet_of(config: Config, model: Path, logs: Path) -> Iterator[Fleet]:
    """The configured engines, being started from a Hugging Face folder, for the time of the block.

    Args:
        logs: folder.
    """
    starter = Starter(config.rollout.server, sglang_of(config), model, logs)
    say(starter.what_happens())
    with Fleet(starter) as fleet:
        yield fleet


@contextmanager
def sampler_of(config: Config) -> Iterator[TrainingSampler]:
    """What a run trains on: samples of engines that are started here, or those of an earlier run.

    Raises:
        UserError: weights, prompts, tokenizer or verifier cannot be used.
    """
    if config.rollout.replay is not None:
        replay: Any = Replay(config, config.rollout.replay)  # has all but what is about weights
        yield replay
        return
    folder = config.run_dir / "sync"
    with fleet_of(config, _servable(config.model.hf, folder), config.run_dir / "logs") as fleet:
        reader = PromptReader(config, config.model.hf)
        with closing(TrainingSampler(config, fleet, reader, folder)) as sampler:
            yield sampler


def keep_samples(config: Config, step: int, rollout: Rollout, advantages_N: torch.Tensor) -> None:
    """Save what a step trains on, if the run saves its samples.

    Raises:
        OSError: the file cannot be written.
    """
    if config.rollout.save_samples:
        from megatron_gpc.rollout.samples import SavedStep, write_samples  # pyarrow: 0.3 s

        saved = SavedStep(rollout.samples, rollout.positions, advantages_N.tolist())
        write_samples(config.run_dir, step, saved)


def trained_on(
    samples: Sequence[Sample], config: RolloutConfig, step: int, warn: Callable[[str], None]
) -> list[int]:
    """Which samples a step trains on, by number: all, or with rollout.overlong=drop those that are
    not cut at the limit.

    Args:
        warn: is told if there are none.
    """
    if config.overlong != "drop":
        return list(range(len(samples)))
    kept = [n for n, sample in enumerate(samples) if sample.finish_reason != "length"]
    if not kept:
        warn(
            f"step {step}: every response was cut at rollout.max_response_tokens="
            f"{config.max_response_tokens}, and rollout.overlong=drop leaves nothing to train on: "
            "no update"
        )
    return kept


def _servable(model: Path, made: Path) -> Path:
    """A Hugging Face folder that engines can start from: the model, or `made` of a converted one.

    Either way `made` has all of it but the weights, which come with the first hand-over.

    Raises:
        UserError: the checkpoint is damaged.
    """
    hf = hf_folder(model)
    if not is_converted(model):
        check_weights(hf)
    made.mkdir(exist_ok=True)
    for left in made.glob(".model.safetensors.*"):  # of hand-overs that were killed
        left.unlink()
    carry_over(hf, made)
    if not is_converted(model):
        return hf
    write_single(made, hf_tensors(MegatronReader(model), hf))
    return made
