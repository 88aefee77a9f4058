"""What the careless and the hostile send to the embedded server, as tables by kind.

Every `Case` names the one status that is right; where the message must name the culprit, `says` is
a part of it.  tests/hostile/test_requests.py sends them all.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

KEY = "the-right-key"
RIGHT = (b"Authorization", f"Bearer {KEY}".encode())
JSON = (b"Content-Type", b"application/json")
HUGE = 10**400
SURROGATE = "\ud800"
NAN, INF = float("nan"), float("inf")
NORM = "model.norm.weight"  # [32] in the tests' model


@dataclass(frozen=True)
class Case:
    """One request.  `raw` goes over the wire as it is, instead of all the rest."""

    kind: str
    what: str
    path: str = "/generate"
    content: bytes = b""
    status: int = 400
    says: str = ""
    method: str = "POST"
    headers: tuple[tuple[bytes, bytes], ...] = (RIGHT, JSON)
    raw: bytes = b""

    def __str__(self) -> str:
        return f"{self.kind}: {self.method} {self.path[:60]} {self.what[:120]}"


def dumped(body: Any) -> bytes:
    """JSON as Python's reader takes it: NaN and numbers that are no float included."""
    return json.dumps(body).encode()


def posted(kind: str, path: str, body: Any, **more: Any) -> Case:
    return Case(kind, _shown(body), path, dumped(body), **more)


def _shown(value: Any) -> str:
    text = ascii(value)
    return text if len(text) < 100 else f"{text[:60]}... ({len(text)} characters)"


# ---- sampling parameters ----

NOT_NUMBERS = [True, "1", [1], {}, NAN, INF, -INF]
SAMPLING: dict[str, list[Any]] = {
    "temperature": [-1, HUGE, 1e7, *NOT_NUMBERS],
    "top_p": [0, -0.1, 1.1, HUGE, -HUGE, *NOT_NUMBERS],
    "top_k": [0, -2, 2**31, 2**70, -(2**70), HUGE, 1.5, *NOT_NUMBERS],
    "max_new_tokens": [0, -1, 1024, 2**31, 2**63, 2**70, HUGE, 1.5, *NOT_NUMBERS],
    "min_new_tokens": [-1, 1000, 2**70, HUGE, 1.5, *NOT_NUMBERS],
    "n": [0, -1, 4097, 10**9, 2**70, HUGE, 1.5, *NOT_NUMBERS],
    "sampling_seed": [-1, 2**64, HUGE, 1.5, *NOT_NUMBERS],
    "stop_token_ids": [[-1], [264], [2**70], [HUGE], [1.5], [True], ["1"], 1, "1", {}, [[1]]],
    "stop": ["", [""], [1], 1, {}, ["."] * 257, "x" * 4097, [SURROGATE], SURROGATE, [["a"]]],
    "ignore_eos": [1, 0, "yes", [], HUGE],
    "no_such_parameter": [1, HUGE, None],
}


def sampling() -> Iterator[Case]:
    for name, values in SAMPLING.items():
        for value in values:
            body = {"input_ids": [53], "sampling_params": {name: value}}
            yield posted("sampling", "/generate", body, says=name)
    held_back = {"stop_token_ids": list(range(264)), "min_new_tokens": 1}
    body = {"input_ids": [53], "sampling_params": held_back}
    yield posted("sampling", "/generate", body, says="all tokens")


# ---- bodies ----

PROMPTS: list[Any] = [
    *({"input_ids": ids} for ids in (
        ["53"], [True], [1.5], [-1], [264], [2**70], [HUGE], [None], [SURROGATE], [[1], "x"],
        [[1], 1], [[True]], [["1"]], [[]], [], [[5], []], "5", 5, {}, True, [NAN], [0] * 1024,
        [[[1]]], [[5], [264]],
    )),
    *({"text": text} for text in ([], 5, "", ["a", ""], SURROGATE, ["a", SURROGATE], "a" * 99_999)),
    {}, {"text": None}, {"prompt": "a"}, {"input_embeds": [[0.5]]},
]  # fmt: skip
BESIDE: list[Any] = [  # a prompt that is well
    *({"rid": rid} for rid in (5, SURROGATE, "x" * 1025, True, [5], {})),
    *({"return_logprob": wanted} for wanted in ("yes", 1, {}, [1], [None])),
    *({"stream": stream} for stream in (True, "no", 1, [])),
    *({"sampling_params": params} for params in ([], "hot", 5, {SURROGATE: 1}, [5], [[]], [{}, 5])),
]
LISTS: list[Any] = [  # two prompts that are well
    *({"rid": rid} for rid in (["x"], ["x", "x"], ["x", None], ["x", "y", "z"])),
    *({"sampling_params": params} for params in ([], [{}], [{}, {}, {}], [{}, {"top_k": 0}])),
    *({"return_logprob": wanted} for wanted in ([True], [True, True, True], [True, 1])),
    {"sampling_params": {"n": 4096}, "text": ["a"] * 17},
]
NO_JSON = [
    b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 50_000, b"\0", b"nul", b'{"text": "a",}',
    b'{"text": "a", "x": ' + b"9" * 5000 + b"}", b'"text"', b"5", b"null", b"[]", b"true",
    b'{"text": "\\ud800"}', b'\xef\xbb\xbf{"text": "a"', b'{"text": "\xff"}', b"text=a",
]  # fmt: skip


def bodies() -> Iterator[Case]:
    for body in PROMPTS:
        yield posted("bodies", "/generate", body)
    for one in BESIDE:
        yield posted("bodies", "/generate", {"text": "a"} | one)
    for one in LISTS:
        yield posted("bodies", "/generate", {"text": ["a", "b"]} | one)
    for content in NO_JSON:
        yield Case("bodies", _shown(content), content=content)
    large = b" " * (64 * 2**20)
    yield Case("bodies", "64 MiB of blanks", content=large, status=413)


# ---- fields of the other routes ----

NO_TEXT = [1, True, 1.5, [], {}, SURROGATE, "x" * 5000]
NO_INTEGER = ["1", True, 1.5, [], {}, -1, 2**70, HUGE, NAN]
NO_LIST = [5, "x", {}, True, [[[]]], [SURROGATE], [5.5]]
NO_BOOL = [1, 0, "yes", [], HUGE]
GROUP = {"master_address": "127.0.0.1", "master_port": 1, "rank_offset": 1, "world_size": 2}
SENT = {"names": [NORM], "dtypes": ["float32"], "shapes": [[32]], "group_name": "none"}
FIELDS: dict[str, tuple[dict[str, Any], dict[str, list[Any]]]] = {
    # route -> a body that is well but for what it names, and what is wrong for its fields
    "/pause_generation": ({}, {"mode": ["now", "", None, ["abort"], *NO_TEXT]}),
    "/abort_request": ({}, {"rid": ["", None, *NO_TEXT], "abort_all": [False, *NO_BOOL]}),
    "/update_weights_from_disk": (
        {"model_path": "/no/such/folder"},
        {
            "model_path": [
                *("", "/no/such/folder", "/" + "a" * 300, "/a" * 2000, "a\0b", "/dev/null"),
                *("/proc", "/dev", "../..", "~", None, *NO_TEXT),
            ],
            "weight_version": NO_TEXT,
            "abort_all_requests": NO_BOOL,
        },
    ),
    "/update_weight_version": (
        {"new_version": "v"},
        {"new_version": [None, *NO_TEXT], "abort_all_requests": NO_BOOL},
    ),
    "/release_memory_occupation": ({}, {"tags": ["weights", ["x"], [], ["weights", 1], *NO_LIST]}),
    "/resume_memory_occupation": ({}, {"tags": ["weights", ["x"], ["weights"], None, *NO_LIST]}),
    "/update_weights_from_tensor": (
        {"serialized_named_tensors": ["AAAA"]},
        {
            "serialized_named_tensors": ["", [], [1], [None], *NO_LIST],
            "load_format": ["direct", "safetensors", "flattened_bucket", *NO_TEXT],
            "weight_version": NO_TEXT,
        },
    ),
}
GROUPS: dict[str, tuple[dict[str, Any], dict[str, list[Any]]]] = {
    "/init_weights_update_group": (
        GROUP | {"backend": "nccl"},
        {
            "master_address": [None, *NO_TEXT],
            "master_port": [0, 65536, 99999, None, *NO_INTEGER],
            "rank_offset": [0, 2, 2**16, None, *NO_INTEGER],
            "world_size": [0, 1, 10**9, None, *NO_INTEGER],
            "group_name": NO_TEXT,
            "backend": ["mpi", "ucc", "", "gloo,nccl", *NO_TEXT],
        },
    ),
    "/destroy_weights_update_group": ({}, {"group_name": ["none", "", SURROGATE, *NO_TEXT]}),
    "/update_weights_from_distributed": (
        SENT,
        {
            "names": [[NORM, NORM], [], None, *NO_LIST],
            "dtypes": [["int64"], ["bool"], ["nn"], ["__name__"], [], None, *NO_LIST],
            "shapes": [[], [[-1]], [[2**48]], [[2**40] * 2], [[2**40]], [[True]], None, *NO_LIST],
            "group_name": ["none", *NO_TEXT],
            "weight_version": NO_TEXT,
        },
    ),
}  # fmt: skip


def one_wrong_field(kind: str, table: dict[str, Any]) -> Iterator[Case]:
    for path, (well, fields) in table.items():
        for name, values in fields.items():
            for value in values:
                yield posted(kind, path, well | {name: value})
        for content in (b"{", b"[]", b"null", b"5", b"[" * 100_000):
            if path != "/destroy_weights_update_group" or content != b"{}":
                yield Case(kind, _shown(content), path, content)


def groups_joined(name: str) -> Iterator[Case]:
    """Broadcasts of a group that is there; rank 0 sends nothing."""
    _, fields = GROUPS["/update_weights_from_distributed"]
    for field in ("names", "dtypes", "shapes"):
        for value in fields[field]:
            body = SENT | {"group_name": name, field: value}
            yield posted("groups", "/update_weights_from_distributed", body)
    again = GROUP | {"backend": "gloo", "group_name": name}
    yield posted("groups", "/init_weights_update_group", again, says="already")


# ---- headers and the lines before them ----

KEYS: list[tuple[str, tuple[tuple[bytes, bytes], ...]]] = [
    ("none", ()),
    *(
        (_shown(value), ((b"Authorization", value),))
        for value in (
            *(b"", b"Bearer", b"Bearer wrong", b"Bearer None", b"Bearer null"),
            *(KEY.encode(), b"Basic " + base64.b64encode(b":" + KEY.encode())),
            *(f"Bearer {KEY}x".encode(), f"Bearer {KEY[:-1]}".encode()),
            f"Bearer {KEY.upper()}".encode(),
            *(f"Bearer  {KEY}".encode(), f"Bearer {KEY}, Bearer x".encode(), b"Bearer \xff\xfe"),
            *("Bearer schlüssel".encode(), b"Bearer " + b"a" * 30_000, b"Bearer *", b"Bearer %00"),
        )
    ),
    ("X-API-Key", ((b"X-API-Key", KEY.encode()),)),
    ("Cookie", ((b"Cookie", f"Authorization=Bearer {KEY}".encode()),)),
    ("Proxy-Authorization", ((b"Proxy-Authorization", RIGHT[1]),)),
    ("a forwarded host", ((b"X-Forwarded-For", b"127.0.0.1"), (b"Host", b"localhost"))),
]  # fmt: skip
ROUTES = [
    *(("GET", path) for path in ("/model_info", "/get_model_info", "/server_info", "/ping")),
    *(("GET", path) for path in ("/flush_cache", "/no_such_path", "/", "//health", "/Health")),
    *(("POST", path) for path in (*FIELDS, *GROUPS, "/generate", "/flush_cache")),
    *(("POST", path) for path in ("/continue_generation", "/begin_weight_update")),
    *(("POST", path) for path in ("/end_weight_update", "/no_such_path")),
    *((method, "/generate") for method in ("OPTIONS", "PUT", "DELETE", "HEAD", "TRACE")),
]


def keys() -> Iterator[Case]:
    everywhere = [key for key in KEYS if key[0] in ("none", "b'Bearer'", "b'Bearer wrong'")]
    for method, path in ROUTES:
        for what, headers in everywhere if path != "/generate" or method != "POST" else KEYS:
            yield Case("keys", what, path, b"{}", 401, method=method, headers=(*headers, JSON))


def _raw(first: bytes, *headers: bytes, body: bytes = b"") -> bytes:
    key = b": ".join(RIGHT)
    return b"\r\n".join((first, b"Host: x", key, *headers, b"", body))


POST, GET = b"POST /generate HTTP/1.1", b"GET /generate HTTP/1.1"
HEADERS: dict[str, tuple[int, bytes]] = {
    "no HTTP": (400, b"hello\r\n\r\n"),
    "HTTP/2's beginning": (400, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    "TLS": (400, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n"),
    "HTTP/9.9": (400, _raw(b"GET /ping HTTP/9.9")),
    "no version": (400, b"GET /ping\r\n\r\n"),
    "no host": (400, b"GET /ping HTTP/1.1\r\n\r\n"),
    "no method": (400, _raw(b" /ping HTTP/1.1")),
    "a method of its own": (405, _raw(b"BREW /generate HTTP/1.1")),
    "an address that is no path": (404, _raw(b"GET x HTTP/1.1")),
    "a control character": (400, _raw(b"GET /pi\x01ng HTTP/1.1")),
    "a header without a colon": (400, _raw(POST, b"no colon")),
    "a header without a name": (400, _raw(POST, b": x")),
    "NUL in a header": (400, _raw(POST, b"X: a\0b")),
    "a header of 1 MB": (400, _raw(POST, b"X: " + b"a" * 2**20)),
    "20,000 headers": (400, _raw(POST, *(b"X: a",) * 20_000)),
    "a path of 1 MB": (400, _raw(b"GET /" + b"a" * 2**20 + b" HTTP/1.1")),
    "a negative length": (400, _raw(POST, b"Content-Length: -1")),
    "a length that is no number": (400, _raw(POST, b"Content-Length: x")),
    "a length with an underscore": (400, _raw(POST, b"Content-Length: 1_0")),
    "a length of 400 digits": (400, _raw(POST, b"Content-Length: " + b"9" * 400)),
    "a length of a petabyte": (413, _raw(POST, b"Content-Length: 1000000000000000")),
    "two lengths": (400, _raw(POST, b"Content-Length: 2", b"Content-Length: 3", body=b"{}")),
    "a chunk of no size": (400, _raw(POST, b"Transfer-Encoding: chunked", body=b"x\r\n{}\r\n\r\n")),
    "an unknown encoding": (400, _raw(POST, b"Transfer-Encoding: zip", body=b"{}")),
    "gzip": (400, _raw(POST, b"Content-Encoding: gzip", b"Content-Length: 2", body=b"\x1f\x8b")),
    "a websocket": (405, _raw(GET, b"Upgrade: websocket", b"Connection: upgrade")),
    "an unknown expectation": (400, _raw(POST, b"Expect: 200", b"Content-Length: 2", body=b"{}")),
}  # fmt: skip


def headers() -> Iterator[Case]:
    for what, (status, raw) in HEADERS.items():
        yield Case("headers", what, status=status, raw=raw)
    for value in (b"text/plain", b"", b"application/x-www-form-urlencoded", b"\xff", b"a" * 9000):
        type_ = (b"Content-Type", value)
        yield Case("headers", _shown(value), content=b'{"text": 5}', headers=(RIGHT, type_))


# ---- paths ----

PATHS = [
    *("/docs", "/redoc", "/openapi.json", "/metrics", "/v1/chat/completions", "/v1/models"),
    *("/generate/", "//generate", "/GENERATE", "/generate%00", "/generate;x", "/x/../generate"),
    *("/%67enerate/", "/generate/1", "/%ff", "/%", "/%zz", "/..", "/../../etc/passwd", "/.env"),
    *("/%2e%2e/%2e%2e/etc/passwd", "/set_internal_state", "/update_weights_from_ipc", "/", "//"),
    *("/" + "a" * 30_000, "/" + "a/" * 10_000, "/shutdown", "/kill", "/load_lora_adapter"),
]


def paths() -> Iterator[Case]:
    for path in PATHS:  # raw: clients tidy them up
        for method in ("POST", "GET"):
            raw = _raw(f"{method} {path} HTTP/1.1".encode(), b"Content-Length: 2", body=b"{}")
            yield Case("paths", method, path, status=404, raw=raw)
    for method in ("GET", "PUT", "DELETE", "PATCH", "HEAD", "TRACE", "OPTIONS"):
        for path in ("/generate", "/pause_generation", "/update_weights_from_disk"):
            yield Case("paths", "", path, b"", 405, method=method)
    for path in ("/model_info", "/server_info", "/health", "/ping"):
        yield Case("paths", "", path, b"{}", 405)
