"""Weights in memory that other processes of this host read where they are."""

from __future__ import annotations

import base64
import os
import pickle
import resource
import signal
import subprocess
import sys
import time
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.multiprocessing import reductions

from megatron_gpc.errors import UserError
from megatron_gpc.weights.handles import Bucket, FileMemory, NamedMemory, Rooms, unpack

NAMED = [
    ("odd", torch.randn(3, 5).bfloat16()),
    ("transposed", torch.randn(4, 3).T),
    ("a number", torch.randn(())),
    ("half", torch.randn(7).half()),
    ("nothing", torch.empty(0)),
    ("a view", torch.randn(100)[2:4]),
]
KINDS = pytest.mark.parametrize("kind", [FileMemory, NamedMemory])


def assert_all(found: list[tuple[str, torch.Tensor]]) -> None:
    assert [name for name, _ in found] == [name for name, _ in NAMED]
    for (name, got), (_, sent) in zip(found, NAMED, strict=True):
        assert got.dtype == sent.dtype and torch.equal(got, sent), name


@KINDS
def test_another_process_reads_them_until_they_are_closed(kind):
    rooms = Rooms(kind)
    packed = Bucket(NAMED, rooms).payload()
    assert len(packed) < 3000
    other = get_context("fork").Process(target=lambda: assert_all(unpack(packed)))
    other.start()
    other.join(60)
    assert other.exitcode == 0
    rooms.close()
    with pytest.raises(UserError, match="serialized_named_tensors"):
        unpack(packed)


def test_torchs_own_functions_read_them_as_often_as_they_like():
    """As SGLang does; torch counts readers, and whoever it takes for the last removes the file."""
    rooms = Rooms(NamedMemory)
    packed = Bucket(NAMED, rooms).payload()
    for _ in range(5):
        content = pickle.loads(base64.b64decode(packed))
        flat_B, (odd, *_) = content["flattened_tensor"], content["metadata"]
        assert flat_B.dtype == torch.uint8 and odd.numel == odd.end_idx - odd.start_idx == 30
        got = flat_B[odd.start_idx : odd.end_idx].view(odd.dtype).reshape(odd.shape)
        assert torch.equal(got, NAMED[0][1])
        del flat_B, got, content
    assert_all(unpack(packed))
    rooms.close()


@KINDS
def test_one_piece_is_filled_while_the_other_is_read(kind):
    rooms, numbers = Rooms(kind), [torch.full((1000,), float(i)) for i in range(6)]
    before = []
    for number in numbers:
        now = unpack(Bucket([("w", number)], rooms).payload())[0][1]
        assert torch.equal(now, number)
        assert all(torch.equal(old, numbers[i]) for i, old in before[-1:])
        before.append((len(before), now))
    assert len(rooms.held) == 2
    larger = torch.randn(5000)
    assert torch.equal(unpack(Bucket([("w", larger)], rooms).payload())[0][1], larger)
    rooms.close()


def test_a_process_that_is_killed_leaves_no_memory_behind():
    code = (
        "import os, torch; from megatron_gpc.weights.handles import *\n"
        "memory = NamedMemory(2**20); print(os.fsdecode(memory._name), flush=True); input()"
    )
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, **pipes) as one:
        file = Path(f"/dev/shm{one.stdout.readline().strip()}")
        assert file.is_file()
        one.send_signal(signal.SIGKILL)
        assert one.stderr.read() == "", "torch's helper does not hold what we write to"
    deadline = time.monotonic() + 60
    while file.exists():
        assert time.monotonic() < deadline, "it stays"
        time.sleep(0.05)


def test_no_room_is_told_in_one_line():
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
    try:
        with pytest.raises(UserError, match="no room in /dev/shm for 64 MiB.*bucket_mb"):
            NamedMemory(2**26)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)


class Call:
    """Pickles to a call."""

    def __init__(self, function: Any, *arguments: Any):
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def opened(name: str, size: Any = 100) -> Call:
    return Call(reductions.rebuild_storage_filename, torch.UntypedStorage, b"", name.encode(), size)


def place(**changed: Any) -> SimpleNamespace:
    whole = {"name": "w", "dtype": torch.float32, "shape": (25,), "start_idx": 0, "end_idx": 100}
    return SimpleNamespace(**{**whole, **changed})


BAD: dict[str, Any] = {
    "no bucket": [1],
    "a number": 5,
    "no memory": {"flattened_tensor": 5, "metadata": []},
    "no list": {"flattened_tensor": torch.Size([1]), "metadata": 5},
    "code": {"flattened_tensor": Call(os.mkdir, "pwned"), "metadata": []},
    "any file": {"flattened_tensor": opened("/../../etc/passwd"), "metadata": []},
    "a file of a process": {"flattened_tensor": opened("/proc/1/fd/0"), "metadata": []},
    "no such memory": {"flattened_tensor": opened("/torch_1_2_3"), "metadata": []},
    "a GPU that is not here": {
        "flattened_tensor": Call(reductions.rebuild_cuda_tensor, *["GPU-0"] * 15),
        "metadata": [],
    },
    "too few words": {"flattened_tensor": Call(reductions.rebuild_cuda_tensor, 1), "metadata": []},
}


@pytest.mark.parametrize("content", BAD.values(), ids=BAD)
def test_what_is_no_bucket_is_refused_and_runs_nothing(content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="serialized_named_tensors"):
        unpack(base64.b64encode(pickle.dumps(content)).decode())
    assert not Path("pwned").exists()


@pytest.mark.parametrize("text", ["", "%", "AAAA", "\ud800"])
def test_what_is_no_pickle_is_refused(text):
    with pytest.raises(UserError, match="serialized_named_tensors"):
        unpack(text)


@pytest.mark.parametrize(
    "changed",
    [
        *({"end_idx": 101}, {"start_idx": -4}, {"start_idx": 101}, {"end_idx": 99}),
        *({"shape": (24,)}, {"shape": (10**12,)}, {"shape": "x"}, {"shape": None}),
        *({"dtype": 5}, {"name": 5}, {"start_idx": 2}, {"end_idx": 1.5}, {"start_idx": True}),
    ],
    ids=str,
)
@KINDS
def test_a_place_that_is_not_in_the_bucket_is_refused(kind, changed):
    rooms = Rooms(kind)
    bucket = Bucket([("w", torch.randn(25))], rooms)
    bucket.places = [place(**changed)]
    with pytest.raises(UserError, match="serialized_named_tensors"):
        unpack(bucket.payload())
    rooms.close()


@pytest.mark.parametrize("size", [0, -1, 101, 2**62, "100", None])
def test_memory_that_is_smaller_than_it_says_is_refused(size):
    memory = NamedMemory(100)
    content = {"flattened_tensor": opened(os.fsdecode(memory._name), size), "metadata": []}
    with pytest.raises(UserError, match="smaller than it says"):
        unpack(base64.b64encode(pickle.dumps(content)).decode())
    memory.close()


def test_a_pipe_is_not_waited_for():
    pipe = Path(f"/dev/shm/torch_{os.getpid()}_1_1")
    os.mkfifo(pipe)
    try:
        with pytest.raises(UserError, match="no regular file"):
            content = {"flattened_tensor": opened(f"/{pipe.name}"), "metadata": []}
            unpack(base64.b64encode(pickle.dumps(content)).decode())
    finally:
        pipe.unlink()
