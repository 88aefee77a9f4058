"""What the collector itself costs: samples a second from an engine that answers at once.

    python tools/bench/collector.py [--prompts 512] [--group 8] [--tokens 32]

The engine here is no engine: it answers every request with the same tokens, without a model, so
that what is measured is client, HTTP, checks, judging and grouping.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import rich.console
import uvicorn
from rich.table import Table

from megatron_gpc.config import Config
from megatron_gpc.config.file import load
from megatron_gpc.engines.fleet import Fleet
from megatron_gpc.engines.starter import Starter
from megatron_gpc.rollout.collector import Collector
from megatron_gpc.rollout.prompts import PromptSource
from megatron_gpc.run.network import free_port
from megatron_gpc.types import Prompt

VERSION = "0"


def answer_at_once(port: int, tokens: int) -> None:
    """The engine's process."""
    ids = list(range(2, 2 + tokens))
    meta = {
        "finish_reason": {"type": "length", "length": tokens},
        "weight_version": VERSION,
        "weight_versions": [{"version": VERSION, "start": 0, "end": tokens}],
        "output_token_logprobs": [[-0.5, token, None] for token in ids],
    }
    one = json.dumps({"text": "", "output_ids": ids, "meta_info": meta})
    others = json.dumps({"weight_version": VERSION, "tp_size": 1}).encode()

    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        body, more = b"", True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        content = others
        if scope["path"] == "/generate":
            content = ("[" + ",".join([one] * len(json.loads(body)["input_ids"])) + "]").encode()
        head = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": 200, "headers": head})
        await send({"type": "http.response.body", "body": content})

    uvicorn.run(app, host="127.0.0.1", port=port, log_level="error", lifespan="off")


def configuration(url: str, prompts: int, group: int, tokens: int) -> Config:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.yaml"
        file.write_text("run_dir: run\nmodel: {hf: hf}\ndata: {prompts: p, verifier: addition}\n")
        return load(
            file,
            [
                f"rollout.server.urls={url}",
                f"rollout.prompts_per_step={prompts}",
                f"rollout.group_size={group}",
                f"rollout.max_response_tokens={tokens}",
            ],
        )


def measure(prompts: int, group: int, tokens: int, rounds: int) -> list[float]:
    """Seconds of each round."""
    port = free_port()
    server = multiprocessing.get_context("spawn").Process(
        target=answer_at_once, args=(port, tokens), daemon=True
    )
    server.start()
    config = configuration(f"http://127.0.0.1:{port}", prompts, group, tokens)
    seconds = []
    try:
        starter = Starter(config.rollout.server, config.sglang, Path("hf"), Path("logs"))
        with Fleet(starter) as engines:
            engines.await_started()
            engines.confirm(engines.alive(), VERSION)
            source = PromptSource([Prompt(i, "", (5, 6, 7), i) for i in range(4 * prompts)], 0)
            collector = Collector(
                config, engines, source, lambda text, label: float(len(text) % 2), str, [1]
            )
            for step in range(1, rounds + 1):
                begin = time.perf_counter()
                engines.run(collector.collect(step))
                seconds.append(time.perf_counter() - begin)
    finally:
        server.terminate()
        server.join(10)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=512)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32, help="tokens of a response")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    best = min(measure(arguments.prompts, arguments.group, arguments.tokens, arguments.rounds))
    samples = arguments.prompts * arguments.group
    table = Table(title=f"collector, {arguments.prompts} x {arguments.group} samples")
    for heading in ("seconds", "requests/s", "samples/s", "ms a sample"):
        table.add_column(heading, justify="right")
    table.add_row(
        f"{best:.2f}",
        f"{arguments.prompts / best:,.0f}",
        f"{samples / best:,.0f}",
        f"{1000 * best / samples:.2f}",
    )
    console = rich.console.Console()
    console.print(table)
    console.print(f"best of {arguments.rounds}; {platform.machine()} CPU")


if __name__ == "__main__":
    main()
