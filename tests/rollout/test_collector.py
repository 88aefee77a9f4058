"""The collector against embedded engines: groups, seeds, filters, stragglers, faults."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import run_config
from transformers import Qwen3MoeForCausalLM

from megatron_gpc.config import RolloutConfig
from megatron_gpc.engines.answers import Generation, RequestRefused
from megatron_gpc.engines.client import SampleRequest
from megatron_gpc.engines.colocation import Colocation
from megatron_gpc.engines.fleet import WATCH_S, Engine, Fleet, WeightsNeeded
from megatron_gpc.engines.probe import Tolerance
from megatron_gpc.engines.starter import Starter
from megatron_gpc.engines.weight_sync import make_sync
from megatron_gpc.errors import UserError
from megatron_gpc.rollout.collector import Collector, overlong_penalty, sample_seed
from megatron_gpc.rollout.evaluation import distinct_right
from megatron_gpc.rollout.groups import Group
from megatron_gpc.rollout.prefetch import Prefetch
from megatron_gpc.rollout.prompts import PromptSource
from megatron_gpc.types import Experts, Prompt, Sample, Verdict
from megatron_gpc.weights import carry_over, family_of
from megatron_gpc.weights.folders import read_hf_config

PROMPTS = [Prompt(i, "", (5 + i, 7, 9), label=i) for i in range(40)]


def even(text: str) -> Verdict:
    right = int(text.split()[0]) % 2 == 0
    return Verdict(float(right), right)


class Rig:
    """Engines with a model's weights, and a collector."""

    def __init__(self, engines: Fleet, folder: Path, config) -> None:
        self.engines, self.config = engines, config
        folder.mkdir(exist_ok=True)
        carry_over(engines.starter.model_path, folder)
        self.sync = make_sync(config.rollout.server, engines, folder)
        self.collector = self.collector_of(config)

    def collector_of(self, config, prompts=PROMPTS, engines=None, experts=None) -> Collector:
        return Collector(
            config,
            engines or self.engines,
            PromptSource(prompts, config.seed),
            # right: the first token is even; so groups are mixed, all right or all wrong
            judge=lambda answers: [even(text) for text, _ in answers],
            decode=lambda ids: " ".join(map(str, ids)),
            stop_token_ids=[1],
            experts=experts,
        )

    def hand_over(self, model: Path, version: int) -> None:
        self.engines.await_alive()
        self.sync.push(load_file(model / "model.safetensors").items(), str(version))

    def collect(self, step: int, collector: Collector | None = None):
        return self.engines.run((collector or self.collector).collect(step))


@pytest.fixture(scope="module")
def start(model_a, tmp_path_factory) -> Iterator[Callable[..., Rig]]:
    """start(*overrides): a rig with model_a's weights as version 0; engines live for the module."""
    started: dict[tuple[str, ...], Rig] = {}

    def make(*overrides: str) -> Rig:
        servers = tuple(o for o in overrides if ".server." in o)
        folder = tmp_path_factory.mktemp("collector")
        config = run_config(folder, model_a, "seed=3", *overrides)
        if servers not in started:
            server = config.rollout.server
            engines = Fleet(Starter(server, config.sglang, model_a, folder / "logs"))
            engines.__enter__()
            engines.await_started()
            started[servers] = Rig(engines, folder / "sync", config)
        rig = started[servers]
        rig.config, rig.collector = config, rig.collector_of(config)
        rig.hand_over(model_a, 0)
        return rig

    yield make
    for rig in started.values():
        rig.sync.close()
        rig.engines.__exit__()


def versions(samples: list[Sample]) -> set[str]:
    return {version for s in samples for version, _, _ in s.weight_versions}


def test_groups_come_prompt_by_prompt_and_judged_on_our_own_decoding(start):
    rig = start()
    rollout = rig.collect(1)
    prompts = [rig.collector.source.at(p).index for p in rollout.positions]
    assert rollout.positions == [0, 1, 2, 3]
    assert [(s.prompt.index, s.sample_index) for s in rollout.samples] == [
        (p, i) for p in prompts for i in range(4)
    ]
    for sample in rollout.samples:
        assert sample.text == " ".join(map(str, sample.token_ids))
        assert sample.reward == float(sample.token_ids[0] % 2 == 0)
        assert 1 <= len(sample.token_ids) == len(sample.logprobs) <= 8
        assert sample.weight_versions == (("0", 0, len(sample.token_ids)),)
    assert rig.collect(2).positions == [4, 5, 6, 7]


def test_a_sample_depends_on_seed_step_position_and_index_alone(start):
    rig = start()

    def tokens(prompts: list[Prompt], count: int, stream: str):
        samples = rig.engines.run(rig.collector.sample(prompts, count, stream))
        return {(s.prompt.index, s.sample_index): s.token_ids for s in samples}

    alone = tokens(PROMPTS[1:2], 2, "step 1")
    together = tokens(PROMPTS[:3], 4, "step 1")
    assert alone.items() <= together.items(), "whatever else is sampled at the same time"
    assert together == tokens(PROMPTS[:3], 4, "step 1")
    assert together != tokens(PROMPTS[:3], 4, "step 2")


@pytest.mark.parametrize(
    "ways",
    [
        ["rollout.prompts_per_step=7"],
        ["rollout.prompts_per_step=5", "rollout.filter=mixed", "rollout.refill_limit=8"],
        ["rollout.prompts_per_step=4", "rollout.oversample=2", "rollout.filter=mixed"],
    ],
    ids=str,
)
def test_a_prompt_that_comes_again_in_a_step_is_answered_anew(start, ways):
    """Of 3 prompts; the server refuses an id twice, as SGLang does."""
    rig = start(*ways)
    collector = rig.collector_of(rig.config, PROMPTS[:3])
    for step in (1, 2):
        rollout = rig.collect(step, collector)
        positions = rollout.positions
        assert len(set(positions)) == len(positions) == rig.config.rollout.prompts_per_step
        groups = [rollout.samples[i : i + 4] for i in range(0, len(rollout.samples), 4)]
        asked = [collector.source.at(position) for position in positions]
        assert [[s.prompt for s in group] for group in groups] == [[p] * 4 for p in asked]
        assert len({p.index for p in asked}) < len(asked)
        assert len({tuple(s.token_ids for s in group) for group in groups}) == len(groups)


def test_runs_that_share_a_server_have_ids_of_their_own(start):
    """The same step of the same configuration, twice at once; one of them ends its requests."""
    rig = start("rollout.max_response_tokens=400")
    engine = rig.engines.engines[0]
    starter = rig.engines.starter
    server = dataclasses.replace(
        rig.config.rollout.server, urls=(engine.url,), api_key_file=starter.key_file()
    )
    with Fleet(Starter(server, starter.sglang, starter.model_path, starter.log_dir)) as engines:
        engines.await_started()
        engines.confirm(engines.engines, "0")
        theirs = rig.collector_of(rig.config, engines=engines)
        made = asyncio.run_coroutine_threadsafe(theirs.collect(1), engines.loop)
        rig.engines.run(in_decode(engine, made))
        rig.engines.run(rig.engines.abort("step-1-"))
        ours = rig.collect(1)
        found = made.result(60)
    assert ours.positions == found.positions
    for sample in (*ours.samples, *found.samples):
        assert sample.finish_reason in ("stop", "length"), "nobody's but the caller's was ended"


def test_seeds_differ_wherever_anything_differs():
    seeds = {
        sample_seed(run, stream, position, index)
        for run in range(3)
        for stream in ("step 1", "step 2", "eval")
        for position in range(20)
        for index in range(20)
    }
    assert len(seeds) > 3 * 3 * 400 - 5, "collisions beyond chance"
    assert all(0 <= seed < 2**31 for seed in seeds)


@pytest.mark.parametrize("way", ["disk", "tensor", "distributed"])
def test_every_way_of_handing_over_reaches_every_engine(start, model_b, way):
    rig = start(f"rollout.server.sync={way}", "rollout.server.engines=2")
    before = rig.engines.run(rig.collector.probe())
    rig.hand_over(model_b, 11)
    assert len(rig.engines.ready()) == 2
    after = rig.engines.run(rig.collector.probe())
    assert versions(before) == {"0"} and versions(after) == {"11"}
    one, other = after[: len(after) // 2], after[len(after) // 2 :]
    assert [s.logprobs for s in one] == [s.logprobs for s in other]
    assert [s.logprobs for s in one] != [s.logprobs for s in before[: len(one)]]


def test_a_probe_has_as_many_tokens_as_asked_for_and_takes_out_an_engine_that_is_off(start):
    rig = start("rollout.server.probe_tokens=100", "rollout.server.engines=2")
    engines = rig.engines
    samples = engines.run(rig.collector.probe())
    assert [len(s.token_ids) for s in samples] == [8] * 2 * 13, "100 tokens of each, stops ignored"
    assert len({s.token_ids for s in samples[:13]}) > 1, "no sample twice"
    tolerance, well = Tolerance(mean=0.1, largest=5.0), [0.04] * 7 + [0.3]
    assert engines.check_probe([well] * 26, tolerance) and len(engines.ready()) == 2
    assert engines.check_probe([well] * 13 + [[0.2] * 8] * 13, tolerance)
    assert engines.ready() == engines.engines[:1]
    assert "0.2 on average and by up to 0.2" in engines.engines[1].problem


def test_dynamic_sampling_drops_uniform_groups_and_asks_for_the_next_prompts(start):
    plain = start("rollout.prompts_per_step=40").collect(1)
    mixed = [
        position
        for i, position in enumerate(plain.positions)
        if len({s.reward for s in plain.samples[4 * i : 4 * i + 4]}) == 2
    ]
    rig = start("rollout.filter=mixed", "rollout.prompts_per_step=24")
    found = rig.collect(1)
    assert found.positions == mixed[:24] and found.positions != list(range(24))
    assert rig.collector.source.state() == {"cursor": mixed[23] + 1, "returned": []}
    metrics = found.metrics
    uniform = metrics["groups_all_right"] + metrics["groups_all_wrong"]
    assert round(uniform * metrics["groups_asked"]) >= mixed[23] + 1 - 24


def test_the_limit_of_refills_fills_the_batch_with_uniform_groups(start):
    rig = start("rollout.filter=mixed", "rollout.prompts_per_step=6", "rollout.refill_limit=1")
    found = rig.collect(1)
    assert sorted(found.positions) == list(range(6)) and found.metrics["groups_asked"] == 6


LONG = ("rollout.max_response_tokens=400", "rollout.oversample=2", "rollout.prompts_per_step=2")


@pytest.mark.parametrize("partial", [False, True])
def test_stragglers_are_aborted_and_their_prompts_come_back(start, model_b, partial):
    rig = start(*LONG, f"rollout.partial={partial}".lower())
    rig.collector.stop_token_ids = list(range(0, 264, 60))  # ends after some 50 tokens, or 300
    first = rig.collect(1)
    state = rig.collector.state()
    assert first.metrics["samples_aborted"] > 0
    assert len(first.positions) == 2 and state["source"]["cursor"] <= 4
    assert all(s.finish_reason in ("stop", "length") for s in first.samples)
    again = rig.collector_of(rig.config)
    again.restore(state)
    assert again.state() == state
    rig.hand_over(model_b, 1)
    second = rig.collect(2, again)
    assert set(second.positions).isdisjoint(first.positions)
    mixed = [s for s in second.samples if len(s.weight_versions) > 1]
    assert bool(mixed) <= partial
    for sample in second.samples:
        ends = [end for _, _, end in sample.weight_versions]
        assert ends[-1] == len(sample.token_ids) == len(sample.logprobs) <= 400
    if partial:
        assert any(state["unfinished"].values())
        kept = {
            (position, s["sample_index"]): s["token_ids"]
            for position, samples in state["unfinished"].items()
            for s in samples
        }
        for i, position in enumerate(second.positions):
            for sample in second.samples[4 * i : 4 * i + 4]:
                begun = kept.get((position, sample.sample_index), ())
                assert sample.token_ids[: len(begun)] == tuple(begun)


def test_partial_samples_that_are_too_old_are_made_anew(start, model_b):
    rig = start(*LONG, "rollout.partial=true", "rollout.max_staleness=1")
    rig.collect(1)
    assert rig.collector.unfinished
    rig.hand_over(model_b, 5)
    second = rig.collect(6)
    assert second.metrics["groups_too_old"] > 0 and versions(second.samples) == {"5"}


@pytest.mark.parametrize("way", ["disk", "tensor"])
def test_a_killed_engine_is_replaced_and_no_sample_is_lost(start, way):
    servers = (f"rollout.server.sync={way}", "rollout.server.engines=2")
    undisturbed = start(*servers).collect(1)
    rig = start(*servers, "rollout.max_response_tokens=8")
    victim = rig.engines.engines[0]
    os.kill(victim.process.pid, signal.SIGKILL)
    disturbed = rig.collect(1)
    assert [s.token_ids for s in disturbed.samples] == [s.token_ids for s in undisturbed.samples]
    assert disturbed.positions == undisturbed.positions

    # a shared folder has the weights; otherwise they come with the next hand-over
    revived = "ready" if way == "disk" else "stale"

    async def revive() -> None:
        async with asyncio.timeout(60):
            while victim.state != revived or not victim.process.alive():
                await asyncio.sleep(0.05)

    rig.engines.run(revive())
    assert rig.engines.counts["faults_restarts"] >= 1


def test_the_loss_of_the_only_engine_asks_for_the_weights_again(start, model_a):
    rig = start("rollout.server.sync=tensor")
    want = [s.token_ids for s in rig.collect(1).samples]
    rig = start("rollout.server.sync=tensor")
    os.kill(rig.engines.engines[0].process.pid, signal.SIGKILL)
    pending = Prefetch(rig.engines, rig.collector)
    assert pending.result(1) is None
    rig.hand_over(model_a, 0)
    assert [s.token_ids for s in pending.result(1).samples] == want


def test_engines_take_turns_with_the_policy_and_none_starts_in_its_turn(start, model_a):
    """Out of turn an embedded engine refuses what SGLang dies of; one that is lost comes later."""
    rig = start("rollout.server.colocated=true", "rollout.server.engines=2")
    engines, turns = rig.engines, Colocation(rig.engines)
    want = [s.token_ids for s in rig.collect(1).samples]
    straggler = engines.run(late_request(engines.engines[0]))
    turns.rest()
    assert engines.run(ended(straggler)) == "abort", "what nobody waits for is ended first"
    assert all(engine.released == {"weights", "kv_cache"} for engine in engines.engines)
    with pytest.raises(RequestRefused, match="resume"):
        engines.run(engines.engines[1].client.generate([SampleRequest([5], {"max_new_tokens": 2})]))
    os.kill(engines.engines[0].process.pid, signal.SIGKILL)
    time.sleep(2.5 * WATCH_S)
    assert [engine.state for engine in engines.engines] == ["down", "stale"]
    turns.take_weights()
    rig.hand_over(model_a, 0)
    turns.take_cache()
    rig.collector = rig.collector_of(rig.config)
    assert [s.token_ids for s in rig.collect(1).samples] == want
    assert engines.counts["faults_restarts"] <= 1
    # weights pushed out of turn are refused: the engine is started anew
    turns.rest()
    engines.asleep = False
    rig.hand_over(model_a, 0)
    assert not any(engine.state == "ready" and engine.released for engine in engines.engines)


async def late_request(engine: Engine) -> asyncio.Task[list[Generation]]:
    """A generation that is under way, of 900 tokens."""
    asked = SampleRequest([5], {"max_new_tokens": 900, "ignore_eos": True})
    task = asyncio.create_task(engine.client.generate([asked]))
    await in_decode(engine, task)
    return task


async def in_decode(engine: Engine, made: asyncio.Future | Future) -> None:
    """Wait until something is being generated; `made` is what it will be."""
    while (await engine.client.server_info())["internal_states"][0]["num_running_reqs"] == 0:
        assert not made.done()


async def ended(task: asyncio.Task[list[Generation]]) -> str:
    return (await task)[0].finish_reason


def test_a_server_that_someone_else_gives_weights_is_not_trained_on(start):
    rig = start("rollout.server.sync=tensor", "rollout.server.retries=0")
    engine = rig.engines.engines[0]
    folder = str(rig.engines.starter.model_path)
    rig.engines.run(engine.client.update_weights_from_disk(folder, "theirs"))
    with pytest.raises(Exception, match="does someone else use this server"):
        rig.collect(1)
    with pytest.raises(WeightsNeeded):
        rig.collect(1)
    assert rig.collector.source.state() == {"cursor": 0, "returned": []}


def test_a_rollout_made_ahead_survives_a_restart(start):
    rig = start()
    pending = Prefetch(rig.engines, rig.collector)
    pending.start(1)
    state = pending.state()
    again = Prefetch(rig.engines, rig.collector_of(rig.config))
    again.restore(state)
    one, other = pending.result(1), again.result(1)
    assert one == other
    assert pending.result(2).positions == again.result(2).positions == [4, 5, 6, 7]


def test_other_prompts_are_refused_and_what_was_made_of_other_settings_is_made_anew(start):
    rig = start()
    pending = Prefetch(rig.engines, rig.collector)
    pending.start(1)
    state = pending.state()
    other = [*PROMPTS[:39], dataclasses.replace(PROMPTS[39], label=40)]
    with pytest.raises(UserError, match="data.prompts: .*resume=none.*data.changed=accept"):
        Prefetch(rig.engines, rig.collector_of(rig.config, other)).restore(state)

    def resumed(prompts, *overrides: str, state=state) -> tuple[Prefetch, Collector]:
        config = run_config(
            rig.engines.starter.log_dir.parent, rig.engines.starter.model_path, "seed=3", *overrides
        )
        collector = rig.collector_of(config, prompts)
        pending = Prefetch(rig.engines, collector)
        pending.restore(state)
        return pending, collector

    accepted, collector = resumed(other, "data.changed=accept")
    assert collector.source.state() == {"cursor": 0, "returned": []}
    assert [s.prompt for s in accepted.result(1).samples[::4]] == [
        collector.source.at(position) for position in range(4)
    ]
    again, _ = resumed(other, state=accepted.state())
    assert again.state() == accepted.state(), "accepted once"
    regrouped, _ = resumed(PROMPTS, "rollout.group_size=2")
    assert [s.sample_index for s in regrouped.result(1).samples] == [0, 1] * 4
    old = {key: state[key] for key in ("source", "unfinished", "ahead")}
    assert resumed(other, state=old)[0].result(1) == pending.result(1), "a checkpoint without one"


def test_a_penalty_for_length_makes_no_group_mixed():
    right, wrong = Verdict(1.0, True), Verdict(0.0, False)

    def verdict(*judged: tuple[Verdict, float]) -> str:
        blank = Sample(PROMPTS[0], 0, (2,), (-1.0,), "a", "length", (("0", 0, 1),))
        return Group(0, PROMPTS[0], [blank.judged(*one) for one in judged]).verdict

    assert verdict((wrong, 0.0), (wrong, 0.75)) == "wrong"
    assert verdict((right, 0.0), (right, 1.0)) == "right"
    assert verdict((right, 1.0), (wrong, 0.0)) == "mixed"


def test_the_overlong_penalty_grows_over_the_buffer():
    rollout = RolloutConfig(max_response_tokens=256, overlong_buffer=64)
    lengths = (1, 192, 224, 256)
    assert [overlong_penalty(n, rollout) for n in lengths] == [0.0, 0.0, 0.5, 1.0]


def test_distinct_right_counts_different_right_answers_a_prompt():
    def sample(text: str, reward: float) -> Sample:
        right = reward > 0
        return Sample(PROMPTS[0], 0, (2,), (-1.0,), text, "stop", (("0", 0, 1),), reward, right)

    samples = [sample("a", 1.0), sample("a", 1.0), sample("b", 1.0), sample("c", 0.0)]
    samples += [sample("d", 0.0)] * 4
    assert distinct_right(samples, 4) == 1.0  # {a, b} and none
    assert torch.tensor([s.reward for s in samples]).mean() == 3 / 8


def test_samples_tell_where_their_tokens_were_routed_also_when_made_in_two_parts(
    model_moe, tmp_path
):
    hf = read_hf_config(model_moe)
    experts = family_of(hf).model_fields(hf).experts
    config = run_config(tmp_path, model_moe, "seed=3", "rollout.partial=true")
    with Fleet(Starter(config.rollout.server, config.sglang, model_moe, tmp_path)) as fleet:
        fleet.await_started()
        fleet.check_routes()
        rig = Rig(fleet, tmp_path / "sync", config)
        rig.hand_over(model_moe, 0)
        collector = rig.collector_of(config, experts=experts)
        whole = fleet.run(collector.collect(1)).samples
        begun = [
            dataclasses.replace(s, token_ids=s.token_ids[:1], logprobs=s.logprobs[:1], routes=r[:n])
            for s in whole
            for r, n in [(s.routes, len(s.routes) // (2 + len(s.token_ids)) * 3)]
        ]
        requests = [collector._request(0, sample, "more") for sample in begun]
        found = fleet.run(fleet.generate(requests))
        in_parts = [collector._extended(*pair) for pair in zip(begun, found, strict=True)]
    model = Qwen3MoeForCausalLM.from_pretrained(model_moe).eval()
    for sample in [*whole, *in_parts]:
        ids = torch.tensor([[*sample.prompt.token_ids, *sample.token_ids[:-1]]])
        with torch.no_grad():
            logits = model(ids, output_router_logits=True).router_logits
        want = torch.stack([one.topk(2).indices for one in logits], 1)
        got = torch.frombuffer(bytearray(sample.routes), dtype=torch.int16).view(want.shape)
        assert torch.equal(got.long().sort(-1).values, want.sort(-1).values)
    assert max(len(sample.token_ids) for sample in in_parts) > 1
    torch.save([dataclasses.asdict(sample) for sample in whole], tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    assert [Sample.from_plain(values) for values in loaded] == whole, "as checkpoints keep them"


def test_engines_of_a_model_without_experts_cannot_tell_routes(start):
    with pytest.raises(UserError, match="train.routing_replay: http.*--enable-return-routed-exper"):
        start().engines.check_routes()


def test_what_was_made_without_routes_is_made_anew_for_a_run_that_needs_them(start):
    rig = start()
    pending = Prefetch(rig.engines, rig.collector)
    pending.start(1)
    state = pending.state()
    experts = Experts(count=4, topk=2, layers=(0,), model_layers=1)
    assert not rig.collector_of(rig.config, experts=experts).restore(state)
    del state["routes"]  # a checkpoint of an older version
    assert not rig.collector_of(rig.config, experts=experts).restore(state)
    assert rig.collector_of(rig.config).restore(state)
