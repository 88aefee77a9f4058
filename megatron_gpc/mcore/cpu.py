"""megatron-core on CPU tensors over gloo.

`install()` runs before the first megatron import.  Written for megatron-core 0.16.1.  Faults that
are not about CPUs are mended everywhere (upstream.py).  The rest is done without CUDA only: inside
`megatron.core`, and only there, the name `torch` becomes a stand-in whose CUDA surface answers for
the CPU; everybody else keeps the real torch, but for `Tensor.cuda` and `Tensor.type`, because a
method has no module in which to replace it.

Each patch says why upstream needs it and when it can go.  "A device argument" means: when the
module takes its device from the tensor or from a parameter, instead of writing "cuda".
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import logging
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from megatron_gpc.errors import UserError
from megatron_gpc.mcore.upstream import core, mend

# Imported before the stand-in is put in place: a module that comes later would see the real torch.
_MODULES = [
    "models.gpt",
    "models.gpt.gpt_layer_specs",
    "models.gpt.moe_module_specs",
    "distributed",
    "optimizer",
    "optimizer_param_scheduler",
    "pipeline_parallel",
    "transformer.attention",
    "transformer.multi_latent_attention",
    "dist_checkpointing",
    "dist_checkpointing.exchange_utils",
    "dist_checkpointing.strategies.torch",
    "dist_checkpointing.strategies.fully_parallel",
    "dist_checkpointing.strategies.filesystem_async",
    "dist_checkpointing.strategies.async_utils",
    "dist_checkpointing.strategies.state_dict_saver",
    "dist_checkpointing.tensor_aware_state_dict",
]


@functools.cache
def install() -> None:
    """Let megatron-core run with what is here; once a process.

    Raises:
        UserError: transformer-engine is installed for a GPU and cannot be imported.
    """
    check_transformer_engine()
    with _compilation(torch.cuda.is_available()):
        for name in _MODULES:
            importlib.import_module(f"megatron.core.{name}")
    if not torch.cuda.is_available():
        _patch_tensor_methods()
        stand_in = _torch_for_cpu()
        for name, module in list(sys.modules.items()):
            if name.startswith("megatron.core") and getattr(module, "torch", None) is torch:
                setattr(module, "torch", stand_in)  # noqa: B010 - a module, to a type checker
        _patch_random()
        _patch_p2p()
        _patch_split_sizes()
        _patch_groups_of_one()
    mend()


def check_transformer_engine() -> None:
    """Where there is a GPU, refuse one that is installed and broken: megatron-core would take it
    half, or die of it.

    It is built against one torch, and with another its libraries lack symbols (an OSError).

    Raises:
        UserError: it cannot be imported; says why.
    """
    if not torch.cuda.is_available() or importlib.util.find_spec("transformer_engine") is None:
        return
    try:
        importlib.import_module("transformer_engine.pytorch")
    except (ImportError, OSError, RuntimeError) as error:
        raise UserError(
            f"transformer-engine is installed and cannot be imported ({error}); build it against "
            "this torch (docs/gpu.md says how), or uninstall it: it is not required"
        ) from None


@contextmanager
def _compilation(wanted: bool) -> Iterator[None]:
    """For the time of the block, torch.compile compiles for tensors of any length, or not at all.

    @jit_fuser is torch.compile.  Every micro-batch has a length of its own, and compiled for one at
    a time, a function falls back to plain torch for good after eight.  A CPU would want a C++
    compiler on the user's machine, and a second of imports in every process.  Goes when core makes
    compilation an option.
    """
    compile_ = torch.compile
    torch.compile = functools.partial(compile_, dynamic=True) if wanted else lambda plain: plain
    try:
        yield
    finally:
        torch.compile = compile_


class _TypeName(str):
    """'torch.FloatTensor' that also equals 'torch.cuda.FloatTensor'."""

    def __eq__(self, other: object) -> bool:
        return str(self) == str(other).replace("torch.cuda.", "torch.")

    __hash__ = str.__hash__


def _patch_tensor_methods() -> None:
    """`Tensor.cuda()` gives the tensor itself, and `Tensor.type()` passes for its CUDA twin.

    Why: language_module (tied embeddings with PP), exchange_utils and grad_scaler call `.cuda()`;
    clip_grads and both optimizers compare `.type()` with 'torch.cuda.FloatTensor'.
    Gone when: they take a device argument and compare dtypes.
    """
    real_type = torch.Tensor.type

    def cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self

    def tensor_type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return real_type(self, *args, **kwargs)
        return _TypeName(real_type(self))

    torch.Tensor.cuda = cuda
    torch.Tensor.type = tensor_type


class _Done:
    """Stream and Event at once: CPU work is finished when its call returns."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def record_event(self, *args: Any) -> _Done:
        return self

    wait_stream = wait_event = synchronize = record = wait = record_event


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _cuda_for_cpu() -> types.ModuleType:
    """`torch.cuda` as megatron.core sees it.

    Why: `current_device()` is used as `device=` (mappings, layers, p2p, DDP buffers, rotary);
    streams, events, nvtx and synchronize appear in p2p, filesystem_async and token_dispatcher; the
    generator functions in tensor_parallel/random and in recomputation.  What is not named here
    falls through to the real module.  Gone when: core takes a device argument.
    """
    cuda = types.ModuleType("torch.cuda")
    cuda.__dict__.update(torch.cuda.__dict__)
    stream = _Done()
    cuda.__dict__.update(
        current_device=lambda: "cpu",
        device_count=lambda: 1,
        set_device=_nothing,
        synchronize=_nothing,
        empty_cache=_nothing,
        Stream=_Done,
        Event=_Done,
        current_stream=lambda *args, **kwargs: stream,
        default_stream=lambda *args, **kwargs: stream,
        stream=lambda stream=None: nullcontext(),
        nvtx=types.SimpleNamespace(range_push=_nothing, range_pop=_nothing, mark=_nothing),
        manual_seed=torch.manual_seed,
        manual_seed_all=torch.manual_seed,
        get_rng_state=lambda *args, **kwargs: torch.get_rng_state(),
        set_rng_state=lambda state, *args, **kwargs: torch.set_rng_state(state),
    )
    return cuda


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def call(*args: Any, **kwargs: Any) -> torch.Tensor:
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return factory(*args, **kwargs)

    return call


def _torch_for_cpu() -> types.ModuleType:
    """`torch` as megatron.core sees it: factories read device="cuda" as "cpu".

    Why: schedules, optimizer, clip_grads and transformer/utils write the literal "cuda".
    Gone when: core takes a device argument.
    """
    fake: Any = types.ModuleType("torch")
    fake.__dict__.update(torch.__dict__)
    fake.__getattr__ = lambda name: getattr(torch, name)  # submodules that torch loads late
    for name in ("tensor", "zeros", "ones", "empty", "empty_like"):
        setattr(fake, name, _on_cpu(getattr(torch, name)))
    fake.cuda = _cuda_for_cpu()
    fake.distributed = types.ModuleType("torch.distributed")
    fake.distributed.__dict__.update(
        torch.distributed.__dict__,
        all_gather=_all_gather,
        reduce_scatter=_reduce_scatter,
        all_reduce=_unless_alone(torch.distributed.all_reduce),
        broadcast=_unless_alone(torch.distributed.broadcast),
    )
    fake.distributed.__getattr__ = lambda name: getattr(torch.distributed, name)
    return fake


def _all_gather(
    outputs: list[torch.Tensor], tensor: torch.Tensor, group: Any = None, async_op: bool = False
) -> Any:
    """all_gather of unequal first dimensions: padded to the longest, then cut.

    Why: mappings gathers along the first dimension for the alltoall dispatcher and for expert
    tensor parallelism; NCCL takes unequal lists, gloo does not.  Gone when: gloo does.
    """
    rows = [len(t) for t in outputs]
    if len(set(rows)) == 1:
        return torch.distributed.all_gather(outputs, tensor, group=group, async_op=async_op)
    padded = tensor.new_zeros(max(rows), *tensor.shape[1:])
    padded[: len(tensor)] = tensor
    parts = [torch.empty_like(padded) for _ in rows]
    torch.distributed.all_gather(parts, padded, group=group)
    for output, part in zip(outputs, parts, strict=True):
        output.copy_(part[: len(output)])
    return None


def _reduce_scatter(
    output: torch.Tensor,
    inputs: list[torch.Tensor],
    op: Any = torch.distributed.ReduceOp.SUM,
    group: Any = None,
    async_op: bool = False,
) -> Any:
    """reduce_scatter of unequal first dimensions: everything summed, this rank's part kept.

    Why and until when: as `_all_gather`.
    """
    if len({t.shape for t in inputs}) == 1:
        return torch.distributed.reduce_scatter(
            output, inputs, op=op, group=group, async_op=async_op
        )
    whole = torch.cat(inputs)
    torch.distributed.all_reduce(whole, op=op, group=group)
    rank = torch.distributed.get_rank(group)
    output.copy_(whole.split([len(t) for t in inputs])[rank])
    return None


def _unless_alone(collective: Callable[..., Any]) -> Callable[..., Any]:
    """A collective that works in place, and has nothing to do in a group of one rank.

    Why: DDP's buffers, the gradient norm and the token count ask for it in every update, whatever
    the size of their group; gloo takes it through two threads and back, and on a busy machine these
    turns were a tenth of a small update.  Gone when: core looks at the size, as its mappings do.
    """

    names = list(inspect.signature(collective).parameters)

    @functools.wraps(collective)
    def call(*args: Any, **kwargs: Any) -> Any:
        given = dict(zip(names, args, strict=False)) | kwargs
        if torch.distributed.get_world_size(given.get("group")) == 1:
            return _Done() if given.get("async_op") else None
        return collective(*args, **kwargs)

    return call


def _patch_groups_of_one() -> None:
    """DDP's buffers are cut over ranks, and made whole, only if there are several.

    A rank's part of them is a view; alone it is all of them.  Why and until when: `_unless_alone`.
    """
    buffers = core("distributed.param_and_grad_buffer")
    for name in ("dist_reduce_scatter_func", "dist_all_gather_func"):
        setattr(buffers, name, _unless_alone(getattr(buffers, name)))


def _patch_random() -> None:
    """The generator that tensor parallelism forks is the CPU's.

    Why: tensor_parallel/random.py reads and writes torch.cuda.default_generators.  Its fork() also
    complains when the CPU generator moves, which here is the one that is forked.
    Gone when: core takes a device argument.
    """
    random = core("tensor_parallel.random")
    random._get_cuda_rng_state = lambda device="cpu", clone=False, graph_safe=False: (
        torch.get_rng_state()
    )
    random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(
        state
    )
    logging.getLogger(random.__name__).addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )


def _patch_p2p() -> None:
    """Pipeline sends keep their tensor alive through a detached alias.

    Why: with overlap_p2p_comm and deallocate_pipeline_outputs the schedule frees a tensor that gloo
    is still sending (on CUDA the stream holds the memory); gradients at VPP 2 were off by
    0.14-0.61. Gone when: gloo holds what it sends.
    """
    p2p = core("pipeline_parallel.p2p_communication")
    send_and_receive = p2p._p2p_ops

    def keep_alive(**kwargs: Any) -> Any:
        return send_and_receive(
            **{
                key: value.detach()
                if key.startswith("tensor_send") and value is not None
                else value
                for key, value in kwargs.items()
            }
        )

    p2p._p2p_ops = keep_alive


def _patch_split_sizes() -> None:
    """Experts' split sizes become the numpy integers that all_to_all wants.

    Why: token_dispatcher converts them only when it moves them off a GPU.
    Gone when: core takes a device argument.
    """
    dispatcher = core("transformer.moe.token_dispatcher")
    move = dispatcher.maybe_move_tensor_to_cpu

    def move_or_convert(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        if as_numpy and torch.is_tensor(tensor):
            return tensor.numpy()
        return move(tensor, as_numpy, False)

    dispatcher.maybe_move_tensor_to_cpu = move_or_convert
