"""The measurements of tests/gpu/check.py: kernels, attention, whole training steps.

Times are medians, in milliseconds; memory is what a way took beside what was there before, in GiB,
and 0 without a GPU.
"""

from __future__ import annotations

import gc
import os
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from megatron_gpc.kernels import chunk_vocab
from megatron_gpc.kernels.head import head_stats, rows_for
from megatron_gpc.kernels.merging import empty_part, merge_ranks
from megatron_gpc.kernels.rows import RowGradient
from megatron_gpc.kernels.vocab_parallel import token_stats

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
VOCAB, HIDDEN = (151_936, 3584) if CUDA else (1000, 64)
SHAPES = {  # layers, hidden, heads, groups, feed-forward: those of Qwen2.5
    "0.5B": (24, 896, 14, 2, 4864),
    "1.5B": (28, 1536, 12, 2, 8960),
}
REAL = (*SHAPES, "experts")
SMALL = (2, 64, 4, 2, 128)
MIXTURE = (2, 2048, 32, 4, 6144)
"""Two layers of Qwen3-30B-A3B's size."""
EXACT = 2e-2
"""Largest relative difference from float64 of what bf16 logits give: their gradient is bf16."""


def timed(work: Callable[[], Any], rounds: int = 5) -> dict[str, float]:
    """{"ms", "GiB"} of a call, after a first that warms up."""
    work()
    taken, before = [], 0
    if CUDA:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    for _ in range(rounds):
        begin = time.perf_counter()
        work()
        if CUDA:
            torch.cuda.synchronize()
        taken.append(1e3 * (time.perf_counter() - begin))
    peak = torch.cuda.max_memory_allocated() - before if CUDA else 0
    return {"ms": statistics.median(taken), "GiB": peak / 2**30}


def or_memory(work: Callable[[], Any]) -> dict[str, Any]:
    """`timed`, or that the GPU's memory did not do."""
    try:
        return timed(work)
    except torch.OutOfMemoryError:
        return {"failed": "out of memory"}
    finally:
        if CUDA:
            torch.cuda.empty_cache()


def ceilings() -> dict[str, Any]:
    """What the card gives at best: a bf16 matrix product, and a copy."""
    n = 8192 if CUDA else 256
    a, b = (torch.randn(n, n, device=DEVICE, dtype=torch.bfloat16) for _ in "ab")
    source = torch.empty(2**31 if CUDA else 2**20, device=DEVICE, dtype=torch.uint8)
    target = torch.empty_like(source)
    product, copy = timed(lambda: a @ b), timed(lambda: target.copy_(source))
    return {
        "product_TFLOPs": 2 * n**3 / product["ms"] / 1e9,
        "copy_TB_s": 2 * source.nbytes / copy["ms"] / 1e9,
    }


def naive(
    logits_TV: torch.Tensor, targets_T: torch.Tensor, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-prob and entropy, as everyone writes them; in the type of the logits."""
    logp_TV = (logits_TV / temperature).log_softmax(-1)
    entropy_T = -(logp_TV.exp() * logp_TV).sum(-1)
    return logp_TV.gather(1, targets_T[:, None])[:, 0], entropy_T


def exactness() -> dict[str, Any]:
    """Each way from hidden states to log-prob and entropy against float64: values, and gradients of
    both, through a padded vocabulary.

    Raises:
        AssertionError: a difference is beyond EXACT.
    """
    torch.manual_seed(0)
    count, hidden, padding, temperature = 64, 64, 128, 0.7
    hidden_TD = torch.randn(count, hidden, device=DEVICE).bfloat16()
    weight_VD = (0.25 * torch.randn(VOCAB + padding, hidden, device=DEVICE)).bfloat16()
    targets_T = torch.randint(VOCAB, (count,), device=DEVICE)
    weights_2T = torch.randn(2, count, device=DEVICE)

    def results(way: Way, dtype: torch.dtype) -> list[torch.Tensor]:
        given = [x.to(dtype, copy=True).requires_grad_() for x in (hidden_TD, weight_VD)]
        logp_T, entropy_T = way(*given, targets_T)
        (logp_T @ weights_2T[0].to(logp_T) + entropy_T @ weights_2T[1].to(logp_T)).backward()
        grads = [x.grad for x in given if x.grad is not None]
        return [logp_T, entropy_T, *grads]

    def exact(hidden: torch.Tensor, weight: torch.Tensor, targets_T: torch.Tensor) -> Stats:
        return naive(hidden @ weight[:VOCAB].T, targets_T, temperature)

    want = results(exact, torch.float64)
    names = ("logp", "entropy", "hidden_gradient", "weight_gradient")
    found: dict[str, Any] = {}
    for name, way in _ways(temperature).items():
        got = results(way, torch.bfloat16)
        apart = {n: _apart(*pair) for n, *pair in zip(names, got, want, strict=True)}
        apart["gradient_of_padding"] = float(got[3][VOCAB:].abs().max())
        assert max(apart.values()) < EXACT, (name, apart)
        found[name] = apart
    return found


def _apart(got: torch.Tensor, exact: torch.Tensor) -> float:
    return float((got.detach().double() - exact.detach()).norm() / exact.detach().norm())


Stats = tuple[torch.Tensor, torch.Tensor]
Way = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Stats]
"""From hidden states, head and targets to log-prob and entropy."""


def _ways(temperature: float = 1.0) -> dict[str, Way]:
    """Those that train.head offers."""
    asked: dict[str, Any] = {"vocab_size": VOCAB, "temperature": temperature, "entropy_grad": True}

    def logits(hidden: torch.Tensor, weight: torch.Tensor, targets_T: torch.Tensor) -> Stats:
        stats = token_stats(hidden @ weight.T, targets_T, **asked)
        return stats.logp_T, stats.entropy_T

    def head(keep_logits: bool, *given: torch.Tensor) -> Stats:
        stats = head_stats(*given, keep_logits=keep_logits, **asked)
        return stats.logp_T, stats.entropy_T

    return {"fused": partial(head, False), "kept": partial(head, True), "logits": logits}


def head() -> dict[str, Any]:
    """From hidden states to their gradients, beside the bare products: three, or four where logits
    are made again; and what a pass over logits makes of the memory's bandwidth."""
    found: dict[str, Any] = {}
    for count in (2048, 8192) if CUDA else (64,):
        ways = _heads(count)
        for name, work in ways.items():
            found[f"T={count} {name}"] = or_memory(work)
    if CUDA:
        found |= {f"T={count} {name}, profile": _profile(ways[name]) for name in ("fused", "kept")}
    return found | _passes()


def _heads(count: int) -> dict[str, Callable[[], None]]:
    hidden_TD = torch.randn(count, HIDDEN, device=DEVICE).bfloat16().requires_grad_()
    weight_VD = torch.randn(VOCAB, HIDDEN, device=DEVICE).div(HIDDEN**0.5).bfloat16()
    weight_VD.requires_grad_()
    targets_T = torch.randint(VOCAB, (count,), device=DEVICE)
    weights_T = torch.randn(count, device=DEVICE)

    def products(logits_made: int) -> None:
        hidden, weight = hidden_TD.detach(), weight_VD.detach()
        for _ in range(logits_made):
            logits_TV = hidden @ weight.T
        logits_TV @ weight
        logits_TV.T @ hidden

    def both(way: Way) -> None:
        logp_T, entropy_T = way(hidden_TD, weight_VD, targets_T)
        ((logp_T + 0.1 * entropy_T) * weights_T).sum().backward()
        hidden_TD.grad = weight_VD.grad = None

    def full(of: Callable[..., Stats]) -> Way:
        return lambda hidden, weight, targets: of((hidden @ weight.T).float(), targets)

    ways = {**_ways(), "naive": full(naive)}
    if CUDA:
        ways["naive compiled"] = full(torch.compile(naive))
    bare = {f"{n} products": partial(products, n - 2) for n in (3, 4)}
    return bare | {name: partial(both, way) for name, way in ways.items()}


def _passes() -> dict[str, Any]:
    """TB/s of logits read to fold them, and read and written to turn them into their gradient.

    A chunk's pass is as short as a call takes the host: ten are timed together.
    """
    count, columns = (8192, chunk_vocab(8192, "cuda")) if CUDA else (64, 1000)
    logits_TC = torch.randn(count, columns, device=DEVICE).bfloat16()
    column_T = torch.randint(columns, (count,), device=DEVICE)
    part_T6 = empty_part(logits_TC)
    passes = rows_for(DEVICE)
    passes.fold(part_T6, logits_TC, column_T, 1.0)
    slope_T = torch.zeros(count, device=DEVICE)
    row = RowGradient.of(merge_ranks(part_T6, None), 1.0, slope_T, slope_T)

    def ten(work: Callable[[], None]) -> float:
        return timed(lambda: [work() for _ in range(10)])["ms"] / 10

    fold = ten(lambda: passes.fold(part_T6, logits_TC, column_T, 1.0))
    turn = ten(lambda: passes.turn_into_gradient(logits_TC, column_T, 1.0, row))
    return {
        "fold_TB_s": logits_TC.nbytes / fold / 1e9,
        "turn_into_gradient_TB_s": 2 * logits_TC.nbytes / turn / 1e9,
    }


def attention() -> dict[str, Any]:
    """Packed attention as it is computed without transformer-engine, and torch's varlen_attn.

    A layer of 7B: 28 heads, 4 groups; 10 sequences of 300 to 3,000 tokens.
    """
    from megatron_gpc.mcore import cpu

    cpu.install()
    from megatron_gpc.mcore.attention import attention as ours

    torch.manual_seed(0)
    heads, groups, size = 28, 4, 128

    def draw(dtype: torch.dtype, lengths: list[int]) -> list[torch.Tensor]:
        shapes = ((sum(lengths), n, size) for n in (heads, groups, groups))
        return [torch.randn(s, device=DEVICE, dtype=dtype, requires_grad=True) for s in shapes]

    def loop(lengths: list[int], *parts: torch.Tensor) -> torch.Tensor:
        each = zip(*(x.split(lengths) for x in parts), strict=True)
        outputs = (ours(*(x[None].transpose(1, 2) for x in one), None, None) for one in each)
        return torch.cat([output[0].transpose(0, 1) for output in outputs])

    drawn = {"long": torch.randint(300, 3000, (10,)), "short": torch.randint(20, 300, (64,))}
    if not CUDA:
        drawn = {"long": torch.tensor([5, 7, 9])}
    found: dict[str, Any] = {}
    for name, lengths_B in drawn.items():
        lengths = lengths_B.tolist()
        parts = draw(torch.bfloat16, lengths)
        found[f"{name}, tokens"] = sum(lengths)
        work = partial(loop, lengths, *parts)
        found[f"{name}, a call a sequence"] = or_memory(lambda w=work: w().sum().backward())
        if CUDA:
            found[f"{name}, varlen_attn"] = _varlen(parts, lengths, work())
    lengths = drawn["long"].tolist()
    single = draw(torch.float32, lengths)
    found["long in fp32"] = or_memory(lambda: loop(lengths, *single).sum().backward())
    longest = max(lengths)
    parts = draw(torch.bfloat16, [longest])
    query, key, value = (x[None].transpose(1, 2).detach() for x in parts)
    seen = torch.ones(longest, longest, dtype=torch.bool, device=DEVICE).tril()
    found["one with a mask"] = or_memory(lambda: ours(query, key, value, seen, None))
    masked = ours(query, key, value, seen, None)
    plain = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    found["mask against causal"] = float((masked - plain).abs().max())
    return found


def _varlen(parts: list[torch.Tensor], lengths: list[int], ours: torch.Tensor) -> dict[str, Any]:
    """What one call for the whole pack would give."""
    from torch.nn.attention.varlen import varlen_attn

    begins = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=DEVICE)
    where = (begins, begins, max(lengths), max(lengths))

    def call() -> torch.Tensor:
        query, key, value = parts
        repeat = query.shape[1] // key.shape[1]
        copies = [x.repeat_interleave(repeat, 1) for x in (key, value)]
        outcome: Any = varlen_attn(query, *copies, *where, window_size=(-1, 0))
        return outcome

    try:
        apart = float((call() - ours).abs().max())
    except (RuntimeError, TypeError, NotImplementedError) as error:
        return {"failed": str(error)[:300]}
    return {**or_memory(lambda: call().sum().backward()), "against a call a sequence": apart}


# ---- weights for engines on the same host ----


def handover() -> dict[str, Any]:
    """A bucket of weights from the device to another process, as `sync: tensor` hands it over: by
    handle of the device's memory, in the host's memory, and inside requests.

    The other process copies it as an engine does, and every number is compared.
    """
    from megatron_gpc.engines.client import pack_tensors
    from megatron_gpc.server.loading import unpack_tensors
    from megatron_gpc.weights.handles import (
        Bucket,
        DeviceMemory,
        FileMemory,
        NamedMemory,
        Rooms,
        unpack,
    )

    # As in a run, whose ranks set it: such memory has no handle that engines can open.
    os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    if CUDA:
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")
    size = 2**27 if CUDA else 2**16
    named = [
        (f"w{number}", torch.randn(size + number, device=DEVICE, dtype=torch.bfloat16))
        for number in range(8)
    ]
    bucket_bytes = sum(tensor.nbytes for _, tensor in named)
    expected = [_sum_of_bits(tensor) for _, tensor in named]
    ways = torch.multiprocessing.get_context("spawn")
    inbox, outbox = ways.Queue(), ways.Queue()
    receiver = ways.Process(target=_engine, args=(unpack, inbox, outbox), daemon=True)
    receiver.start()
    read_ms: dict[str, float] = {}

    def hand_over(name: str, room: Callable[[int], Any]) -> None:
        bucket = Bucket(named, room)
        inbox.put(bucket.payload())
        got, read_ms[name] = outbox.get(timeout=100)
        assert got == expected, f"{name}: the other process has other numbers"

    kinds: dict[str, Callable[[int], Any]] = {
        "named memory of the host": Rooms(NamedMemory),
        "memory of the host": Rooms(FileMemory),
    }
    if CUDA:
        kinds = {"by handle": DeviceMemory, **kinds}
    found: dict[str, Any] = {"MiB": bucket_bytes // 2**20}
    found["a copy"] = timed(lambda: [tensor.clone() for _, tensor in named])
    for name, kind in kinds.items():
        found[name] = {**timed(partial(hand_over, name, kind), rounds=3), "read_ms": read_ms[name]}
        if isinstance(kind, Rooms):
            kind.close()
    some = named[:1]
    found["inside requests"] = {
        **timed(lambda: unpack_tensors(pack_tensors(some)), rounds=1),
        "MiB": some[0][1].nbytes // 2**20,
    }
    inbox.put(None)
    receiver.join(60)
    if CUDA:
        torch.cuda.ipc_collect()
        torch.cuda.empty_cache()
        held = torch.cuda.memory_allocated() - bucket_bytes
        assert held < bucket_bytes // 2, f"{held} bytes are held after the other process is done"
    return found


def _engine(unpack: Callable[[str], Any], inbox: Any, outbox: Any) -> None:
    """In the other process: copy what comes into weights of its own, and say their sums."""
    weights: dict[str, torch.Tensor] = {}
    while (payload := inbox.get()) is not None:
        begin = time.perf_counter()
        for name, tensor in unpack(payload):
            weights.setdefault(name, torch.empty_like(tensor, device=DEVICE)).copy_(tensor)
        if CUDA:
            torch.cuda.synchronize()
        read_ms = 1e3 * (time.perf_counter() - begin)
        del tensor
        outbox.put(([_sum_of_bits(own) for own in weights.values()], read_ms))


def _sum_of_bits(tensor: torch.Tensor) -> int:
    """Of a bf16 tensor, the same in whatever order."""
    return int(tensor.view(torch.int16).sum(dtype=torch.int64))


# ---- training steps ----


def steps(models: str) -> dict[str, Any]:
    """Scoring and updates of models with random weights, as a run makes them, on one process.

    The small ones also met faults of megatron-core without transformer-engine: experts, a
    replicated optimizer, and the optimizer's state for a checkpoint.
    """
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
    from megatron_gpc.run.network import free_port

    os.environ["MASTER_PORT"] = str(free_port())
    from megatron_gpc.mcore import cpu

    cpu.install()
    from megatron_gpc.mcore.native import uses_transformer_engine

    found: dict[str, Any] = {"transformer-engine": uses_transformer_engine(torch.bfloat16)}
    for name, (hf, overrides) in _models(models).items():
        begin, there = time.monotonic(), torch.cuda.memory_allocated() if CUDA else 0
        try:
            with TemporaryDirectory() as folder, _policy(Path(folder), hf, overrides) as made:
                found[name] = _step(*made, hf, real=models != "small")
            if "peak_GiB" in found[name]:
                found[name]["peak_GiB"] -= there / 2**30
        except Exception as error:  # the others are still worth knowing
            traceback.print_exc()
            found[name] = {"error": f"{type(error).__name__}: {error}"[:300]}
        found[name]["seconds"] = time.monotonic() - begin
        gc.collect()
        if CUDA:
            torch.cuda.empty_cache()
    return found


def _models(models: str) -> dict[str, tuple[dict[str, Any], list[str]]]:
    ways = [f"train.experts={way}" for way in ("each", "grouped")]
    if models == "small":
        small = {"replicated": (_dense(SMALL), ["optim.distributed=false"])}
        return small | {way: (_experts(SMALL, 4, 64), [way]) for way in ways}
    if models == "experts":
        return {f"128, {way}": (_experts(MIXTURE, 128, 768), [way]) for way in ways}
    return {models: (_dense(SHAPES[models]), [])}


def _dense(shape: tuple[int, ...]) -> dict[str, Any]:
    layers, hidden, heads, groups, width = shape
    return {
        **{"model_type": "qwen2", "vocab_size": VOCAB, "hidden_size": hidden},
        **{"intermediate_size": width, "num_hidden_layers": layers},
        **{"num_attention_heads": heads, "num_key_value_heads": groups},
        **{"max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 1e6},
        **{"hidden_act": "silu", "tie_word_embeddings": True},
    }


def _experts(shape: tuple[int, ...], count: int, width: int) -> dict[str, Any]:
    return {
        **_dense(shape),
        **{
            "model_type": "qwen2_moe",
            "num_experts": count,
            "num_experts_per_tok": count // 16 or 2,
        },
        **{"moe_intermediate_size": width, "shared_expert_intermediate_size": width},
        **{"decoder_sparse_step": 1, "norm_topk_prob": False, "mlp_only_layers": []},
        "tie_word_embeddings": False,
    }


@contextmanager
def _policy(folder: Path, hf: dict[str, Any], overrides: list[str]) -> Iterator[tuple[Any, Any]]:
    from megatron_gpc.config.file import load
    from megatron_gpc.mcore.policy import Policy
    from megatron_gpc.mcore.setup import process_groups
    from megatron_gpc.weights import family_of

    (folder / "config.yaml").write_text(
        f"run_dir: {folder}/run\nmodel: {{hf: {folder}, dtype: bfloat16}}\n"
        "data: {prompts: none, verifier: addition}\n"
        "rollout: {max_response_tokens: 4096}\n"
        "train: {micro_batch_size: 8, micro_batch_tokens: 8192, mini_batches: 2, epochs: 1}\n"
    )
    config = load(folder / "config.yaml", overrides)
    with process_groups(config):
        policy = Policy(config, family_of(hf).model_fields(hf))
        policy.weights_changed()
        yield config, policy


def _step(config: Any, policy: Any, hf: dict[str, Any], real: bool) -> dict[str, Any]:
    from megatron_gpc.batching import mini_batches, token_streams
    from megatron_gpc.doctor.memory import GIB, estimate
    from megatron_gpc.mcore.policy import UPDATE_MAXIMA
    from megatron_gpc.mcore.setup import device
    from megatron_gpc.metrics.reduce import Sums
    from megatron_gpc.types import Bounds

    batch = _rollout(8 if real else 4, (500, 4000) if real else (4, 12))
    ones_T = torch.ones_like(batch.rollout_logp_T)

    def step() -> dict[str, float]:
        updated: dict[str, float] = {}
        scored = policy.score(batch)
        streams = token_streams(batch, scored.logp_T, ones_T)
        sums = Sums(policy.update_means, UPDATE_MAXIMA, device())
        for samples in mini_batches(batch.num_samples, 2, 1, 0, 1):
            updated = policy.update(batch, samples, streams, Bounds(0.0, 1.2, 0.0, 0.8), sums)
        return updated

    updated = step()
    assert not updated["skipped"], updated
    policy.optimizer.state_dict()  # as a checkpoint asks for it
    found: dict[str, Any] = {
        "devices": sorted({p.device.type for m in policy.models for p in m.parameters()}),
        "grad_norm": updated["grad_norm"],
    }
    assert found["devices"] == [DEVICE], found
    measured = timed(step, rounds=1)
    parameters = sum(p.numel() for m in policy.models for p in m.parameters())
    tokens = int(batch.tokens.numel())
    # 2 operations a parameter and token to score, 6 to train
    flops = 8 * parameters * tokens
    found |= {"tokens": tokens, "ms": measured["ms"], "TFLOPs": flops / measured["ms"] / 1e9}
    if real:
        found["peak_GiB"] = torch.cuda.max_memory_allocated() / GIB
        found["estimated_GiB"] = estimate(config, hf, 1).trainer / GIB
        found |= _profile(step)
    return found


def _rollout(count: int, lengths: tuple[int, int]) -> Any:
    from megatron_gpc.batching import pack
    from megatron_gpc.types import Prompt, Sample

    draw, samples, prompt = torch.Generator().manual_seed(0), [], 200 if CUDA else 3
    for index in range(count):
        length = int(torch.randint(*lengths, (), generator=draw))
        drawn = torch.randint(VOCAB, (prompt + length,), generator=draw).tolist()
        samples.append(
            Sample(
                Prompt(index // 2, "", tuple(drawn[:prompt]), None),
                *(index % 2, tuple(drawn[prompt:]), (-11.9,) * length, "", "stop"),
                weight_versions=(("0", 0, length),),
            )
        )
    return pack(samples, torch.tensor([1.0, -1.0] * (count // 2)))


def _profile(work: Callable[[], Any]) -> dict[str, Any]:
    """The kernels that take longest, and how often the host waits for the GPU."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiled:
        work()
    events = profiled.key_averages()
    longest = sorted(events, key=lambda event: -event.self_device_time_total)[:15]
    return {
        "gpu_busy_ms": sum(event.self_device_time_total for event in events) / 1e3,
        "host_syncs": sum(event.count for event in events if "Synchronize" in event.key),
        "kernels_ms": {e.key[:60]: round(e.self_device_time_total / 1e3, 1) for e in longest},
    }
