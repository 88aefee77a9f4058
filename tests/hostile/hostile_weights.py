"""What the careless and the hostile hand over as weights: folders, tensors and pickles."""

from __future__ import annotations

import base64
import io
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from hostile_requests import NORM, SURROGATE, Case, dumped, posted


def folders(root: Path) -> Iterator[Case]:
    """Folders that exist, and are not the model's."""

    def made(name: str, fill: Callable[[Path], Any]) -> Case:
        folder = root / name
        folder.mkdir()
        fill(folder)
        body = {"model_path": str(folder), "weight_version": "bad"}
        return Case("paths", name, "/update_weights_from_disk", dumped(body))

    weights = "model.safetensors"
    header = {"w": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]}}
    index = {"metadata": {}, "weight_map": {NORM: "../../../../etc/passwd"}}
    bad = {
        "empty": lambda f: None,
        "no safetensors": lambda f: (f / weights).write_bytes(b"garbage"),
        "an empty file": lambda f: (f / weights).write_bytes(b""),
        "a header of 2**63 bytes": lambda f: (f / weights).write_bytes(b"\xff" * 7 + b"\x7f{}"),
        "a tensor that is not there": lambda f: (f / weights).write_bytes(
            struct.pack("<Q", len(dumped(header))) + dumped(header)
        ),
        "a folder for a file": lambda f: (f / weights).mkdir(),
        "a FIFO": lambda f: os.mkfifo(f / weights),
        "an endless device": lambda f: (f / weights).symlink_to("/dev/zero"),
        "a link to itself": lambda f: (f / weights).symlink_to(weights),
        "a link to nowhere": lambda f: (f / weights).symlink_to("/no/such/file"),
        "an index elsewhere": lambda f: (f / f"{weights}.index.json").write_bytes(dumped(index)),
        "an index that is none": lambda f: (f / f"{weights}.index.json").write_bytes(b"[]"),
        "a deep index": lambda f: (f / f"{weights}.index.json").write_bytes(b"[" * 100_000),
        "a FIFO for an index": lambda f: os.mkfifo(f / f"{weights}.index.json"),
        "a pickle that runs": lambda f: (f / "pytorch_model.bin").write_bytes(
            pickle.dumps(Runs(os.mkdir, str(root / "mark")))
        ),
    }
    for name, fill in bad.items():
        yield made(name, fill)


# ---- tensors and pickles ----


class Runs:
    """Pickled, it calls a function."""

    def __init__(self, function: Any, *arguments: Any):
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def _tensors(kind: str, what: str, content: bytes, says: str = "") -> Case:
    text = base64.b64encode(content).decode()
    body = {"serialized_named_tensors": [text], "weight_version": "bad"}
    return Case(kind, what, "/update_weights_from_tensor", dumped(body), says=says)


def _other(**more: Any) -> torch.Tensor:
    return torch.ones(32, **more)


TENSORS: dict[str, tuple[Any, str]] = {
    "twice": ([(NORM, _other()), (NORM, _other())], "comes 2 times"),
    **{
        str(dtype): ([(NORM, torch.ones(32).to(dtype))], "floating-point")
        for dtype in (torch.int64, torch.int8, torch.bool, torch.uint8, torch.complex64)
    },
    "one too many": ([(NORM, torch.ones(33))], "has shape"),
    "none": ([(NORM, torch.ones(0))], "has shape"),
    "a number": ([(NORM, torch.tensor(1.0))], "has shape"),
    "two dimensions": ([(NORM, torch.ones(1, 32))], "has shape"),
    "a trillion from one": ([(NORM, torch.ones(1).expand(10**12))], "has shape"),
    "another name": ([("model.norm", _other())], "no such tensor"),
    "no name": ([("", _other())], "no such tensor"),
    "half a character": ([(SURROGATE, _other())], ""),
    "a name of 1 MB": ([("x" * 2**20, _other())], "no such tensor"),
    "two lines": ([("a\nb", _other())], "no such tensor"),
    "a parameter": ([(NORM, torch.nn.Parameter(_other()))], "is not allowed"),
    "a sparse one": ([(NORM, _other().to_sparse())], "is not allowed"),
    "one without data": ([(NORM, _other(device="meta"))], "is not allowed"),
    "a list": ([(NORM, [1.0] * 32)], "expected a pickled list"),
    "a triple": ([(NORM, _other(), 1)], "expected a pickled list"),
    "a list of lists": ([[NORM, _other()]], "expected a pickled list"),
    "a number as a name": ([(5, _other())], "expected a pickled list"),
    "a dict": ({NORM: _other()}, "expected a pickled list"),
    "None": (None, "expected a pickled list"),
    "a tensor": (_other(), "expected a pickled list"),
}


def tensors() -> Iterator[Case]:
    for what, (named, says) in TENSORS.items():
        yield _tensors("tensors", what, pickle.dumps(named), says)
    for text in ("", "%", SURROGATE, "AAAA", "A", "AA==A", "é", " "):
        body = {"serialized_named_tensors": [text]}
        yield posted("tensors", "/update_weights_from_tensor", body)
    content = pickle.dumps([(NORM, _other())])
    for end in (1, 2, len(content) // 2, len(content) - 1):
        yield _tensors("tensors", f"cut at {end}", content[:end])
    storage = io.BytesIO()
    with zipfile.ZipFile(storage, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(64 * 2**20))
    yield _tensors("tensors", "a zip bomb", pickle.dumps(Runs(_from_bytes, storage.getvalue())))


_from_bytes = torch.storage._load_from_bytes  # type: ignore[attr-defined]


def _calling(module: str, name: str, argument: str) -> dict[str, bytes]:
    """The ways in which a pickle calls `module.name(argument)`."""
    text = b"X" + struct.pack("<I", len(argument)) + argument.encode()
    found = f"c{module}\n{name}\n".encode()
    short = (bytes([0x8C, len(part)]) + part.encode() for part in (module, name))
    return {
        "REDUCE": b"\x80\x02" + found + text + b"\x85R.",
        "STACK_GLOBAL": b"\x80\x04" + b"".join(short) + b"\x93" + text + b"\x85R.",
        "NEWOBJ": b"\x80\x02" + found + text + b"\x85\x81.",
        "INST": b"(" + f"S{argument!r}\ni{module}\n{name}\n.".encode(),
        "OBJ": b"(" + found + text + b"o.",
    }


def pickles(mark: Path) -> Iterator[Case]:
    """What would make the folder `mark`, change a class for good, or take all memory."""
    code = f"__import__('os').mkdir({str(mark)!r})"
    calls = {
        **{("os", "mkdir"): str(mark), ("posix", "mkdir"): str(mark)},
        ("os", "makedirs"): str(mark),
        **{("builtins", "eval"): code, ("builtins", "exec"): code},
        **{("os", "system"): f"mkdir {mark}", ("subprocess", "getoutput"): f"mkdir {mark}"},
        ("torch.utils.collect_env", "run"): f"mkdir {mark}",
        ("torch", "load"): str(mark),
        ("collections", "OrderedDict.fromkeys"): "x",
        ("torch._utils", "_rebuild_tensor_v2.__globals__"): "x",
        ("megatron_gpc.server.loading", "os.mkdir"): str(mark),
    }  # fmt: skip
    for (module, name), argument in calls.items():
        for way, content in _calling(module, name, argument).items():
            yield _tensors("pickles", f"{module}.{name} by {way}", content)
    inner = pickle.dumps(Runs(os.mkdir, str(mark)))
    yield _tensors("pickles", "in a storage", pickle.dumps([Runs(_from_bytes, inner)]))
    for module, name in (("torch._utils", "_rebuild_tensor_v2"), ("collections", "OrderedDict")):
        for slots in (b"}X\x05\x00\x00\x00spoilK\x01s", b"N}X\x05\x00\x00\x00spoilK\x01s\x86"):
            content = b"\x80\x02" + f"c{module}\n{name}\n".encode() + slots + b"b."
            yield _tensors("pickles", f"BUILD on {module}.{name}", content)
    for what, content in {
        "100,000 marks": b"(" * 100_000 + b".",
        "100,000 lists in lists": b"]" + b"]" * 100_000 + b"a" * 100_000 + b".",
        "a memo of 2**31 places": b"\x80\x02Nr\xff\xff\xff\x7f.",
        "a memo of 2**40 places": b"Np1099511627776\n.",
        "2**35 bytes announced": b"\x80\x05\x8e" + struct.pack("<Q", 2**35) + b".",
        "2**35 bytes of a bytearray": b"\x80\x05\x96" + struct.pack("<Q", 2**35) + b".",
        "a frame of 2**62 bytes": b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"N.",
        "a number of 2**31 bytes": b"\x80\x02\x8b\xff\xff\xff\x7f.",
        "a persistent id": b"\x80\x02K\x01Q.",
        "an extension": b"\x80\x02\x82\x01.",
        "an out-of-band buffer": b"\x80\x05\x97.",
        "protocol 99": b"\x80\x63N.",
        "nothing to pop": b"0.",
        "no such opcode": b"\xff.",
        "a key that cannot be": b"\x80\x02}]K\x01s.",
    }.items():
        yield _tensors("pickles", what, content)
