"""The engines that make rollouts: started or found, watched, started again, asked in turn.

An engine is `ready` (answers, with the current weights), `stale` (answers, but has missed weights)
or `down`.  One of our own that dies, or lives and is not healthy, is started again; with sync=disk
it takes the current weights from the shared folder at once, otherwise at the next hand-over.  The
run goes on while one engine is ready.

All of it happens on an event loop in a thread of its own, so that samples can be made while the
trainer trains.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import re
import secrets
import threading
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

from megatron_gpc.engines.answers import (
    Generation,
    MalformedAnswer,
    RolloutError,
    ServerUnavailable,
)
from megatron_gpc.engines.client import SampleRequest, SGLangClient, retrying
from megatron_gpc.engines.probe import Tolerance
from megatron_gpc.engines.process import ServerError, ServerProcess, SGLangServer
from megatron_gpc.engines.starter import Starter
from megatron_gpc.errors import UserError
from megatron_gpc.run.network import is_here, own_address

T = TypeVar("T")
P = TypeVar("P", bound=ServerProcess)
Memory = Literal["weights", "kv_cache"]
LOOPBACK = {"127.0.0.1", "localhost", "::1"}
STARTED_POLL_S = 0.5
"""How often is looked whether a start is still wanted [s]."""
CANCEL_S = 10.0
"""How long work that is called off may take to end [s]."""
WATCH_S = 1.0
"""How often engines are looked at [s]."""
UNHEALTHY_LOOKS = 3
"""So often in a row an engine that was started here may say that it is not healthy."""
LONG_S = 3600.0
"""Backstop for what has deadlines of its own [s]."""


class WeightsNeeded(RolloutError):
    """Engines answer, but none has the current weights: hand them over again."""


@dataclasses.dataclass(eq=False)
class Engine:
    """One server."""

    number: int
    url: str
    client: SGLangClient
    tp_size: int = 1
    reads: Literal["requests", "host", "gpu"] = "requests"
    """Where it can read the trainer's tensors: in requests alone, in this host's memory too, or on
    the trainer's GPU as well."""
    process: ServerProcess | None = None
    """None if others started it."""
    state: Literal["ready", "stale", "down"] = "stale"
    in_flight: int = 0
    reviving: asyncio.Task[None] | None = None
    released: set[Memory] = dataclasses.field(default_factory=set)
    """What it has given up, see colocation.py."""
    problem: str = ""
    """Why it is down."""
    weight_loads: int | None = None
    """How often its weights had been replaced when it got the current ones; SGLang does not say."""
    unhealthy: int = 0
    """How often in a row it was down and said, when asked, that it is not healthy."""

    def fail(self, error: BaseException) -> None:
        self.state, self.problem = "down", f"{self.url}: {error or type(error).__name__}"


class Fleet:
    """All engines of a run.  Use as `with Fleet(...) as fleet`.

    Args:
        starter: how engines are started or found.
    """

    def __init__(self, starter: Starter):
        self.starter, self.config = starter, starter.config
        self.engines: list[Engine] = []
        self.current: tuple[str, str] | None = None
        """(folder, name) of weights that a restarted engine can read; None: they come otherwise."""
        self.weights: str | None = None
        """What ready engines call their weights, see `name_of`."""
        self.asleep = False
        """Whether the GPUs are the policy's (colocation.py); no engine is started then."""
        self.counts = Counter(faults_restarts=0, faults_retries=0, faults_malformed=0)
        """Engines started again, requests sent again, answers refused; since this start."""
        self.router: SGLangServer | None = None
        self._router_client: SGLangClient | None = None
        self._changed = asyncio.Event()
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="rollout", daemon=True)
        # The kernel ends a server when the thread that started it ends: these live as long as we.
        self._starters = ThreadPoolExecutor(self.config.engines + 1, "starter")
        self._closing = False
        self._asked: list[Engine] = []
        self._rid_prefix = uuid.uuid4().hex[:12]
        self._rid_numbers = itertools.count(1)

    # ---- life ----

    def __enter__(self) -> Fleet:
        """Start or find the engines; does not wait for them, see `await_started`."""
        self._thread.start()
        self._starting = asyncio.run_coroutine_threadsafe(self._start(), self.loop)
        return self

    def __exit__(self, *_: object) -> None:
        self._closing = True
        self.starter.given_up.set()
        self._starting.cancel()
        with suppress(RuntimeError, TimeoutError):
            asyncio.run_coroutine_threadsafe(self._close(), self.loop).result(30)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(10)
        for process in [e.process for e in self.engines] + [self.router]:
            if process is not None:
                process.stop()
        self._starters.shutdown(wait=True, cancel_futures=True)

    def await_started(self, over: Callable[[], bool] = lambda: False) -> bool:
        """Wait until all engines are up, at the start of a run.

        Returns:
            False if `over` said meanwhile that they are not needed any more.

        Raises:
            ServerError: one did not start.
            ServerUnavailable: one that others started does not answer.
            UserError: urls_file or api_key_file cannot be used.
        """
        deadline = time.monotonic() + self.config.start_timeout_s + 60
        while not over():
            wait([self._starting], STARTED_POLL_S)
            if self._starting.done() or time.monotonic() > deadline:
                self._starting.result(0)
                return True
        return False

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Do it on the engines' loop and wait for it; from any other thread."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(LONG_S)

    async def _start(self) -> None:
        starter = self.starter
        urls = await starter.running_urls()
        if urls:
            self.engines = [Engine(i, url, starter.client(url)) for i, url in enumerate(urls)]
            timeout_s = self.config.start_timeout_s
            await asyncio.gather(*(e.client.wait_until_healthy(timeout_s) for e in self.engines))
        else:
            starts = [
                self._launch(starter.engine, i, starter.port(i)) for i in range(self.config.engines)
            ]
            self.engines = [
                Engine(i, process.url, starter.client(process.url), process=process)
                for i, process in enumerate(await asyncio.gather(*starts))
            ]
        for engine in self.engines:
            info = await self._insist(engine.client.server_info)
            engine.tp_size = int(info.get("tp_size", 1))
            if is_here(urlsplit(engine.url).hostname or ""):
                # One that others started may not see our GPU, and SGLang would die of its handle.
                sees = engine.process is not None and starter.shows_gpus
                engine.reads = "gpu" if sees and info.get("device") == "cuda" else "host"
        if self.config.router:
            urls = [engine.url for engine in self.engines]
            self.router = await self._launch(starter.router, urls)
            self._router_client = starter.client(self.router.url, router=True)
        self._watcher = asyncio.create_task(self._watch())

    async def _launch(self, start: Callable[..., P], *arguments: Any) -> P:
        """Have a thread that lives as long as this object start a process."""
        return await self.loop.run_in_executor(self._starters, start, *arguments)

    async def _close(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        if tasks:  # or Python complains of tasks that were never awaited
            await asyncio.wait(tasks, timeout=CANCEL_S)
        for client in [e.client for e in self.engines] + [self._router_client]:
            if client is not None:
                await client.close()

    # ---- supervision ----

    async def _watch(self) -> None:
        while not self._closing:
            for engine in self.engines:
                if engine.process is not None and not engine.process.alive():
                    engine.fail(engine.process.failure("has ended"))
                idle = engine.reviving is None or engine.reviving.done()
                if engine.state == "down" and idle and not self.asleep:
                    engine.reviving = asyncio.create_task(self._revive(engine))
            await asyncio.sleep(WATCH_S)

    async def _revive(self, engine: Engine) -> None:
        """Bring it back to `stale`, and with sync=disk to `ready`."""
        process = engine.process
        restart = process is not None and (engine.released or not process.alive())
        if not restart and not await engine.client.health():
            engine.unhealthy += 1
            restart = process is not None and engine.unhealthy >= UNHEALTHY_LOOKS
            if not restart:
                return
        engine.unhealthy = 0
        if process is not None and restart:
            if self.counts["faults_restarts"] >= self.config.max_restarts:
                return
            self.counts["faults_restarts"] += 1
            try:
                await self.loop.run_in_executor(self._starters, process.stop)
                engine.released.clear()
                port = int(engine.url.rpartition(":")[2])
                engine.process = await self._launch(self.starter.engine, engine.number, port)
            except ServerError as error:
                engine.fail(error)
                return
        engine.state = "stale"
        if self.current is not None:
            folder, name = self.current
            with _failing(engine):
                await self._insist(engine.client.update_weights_from_disk, folder, name)
                await self._confirm(engine, name)
                if (folder, name) != self.current:
                    engine.state = "stale"
        self._changed.set()

    def ready(self) -> list[Engine]:
        return [engine for engine in self.engines if engine.state == "ready"]

    def alive(self) -> list[Engine]:
        return [engine for engine in self.engines if engine.state != "down"]

    def check_routes(self) -> None:
        """Hold the engines to telling which experts a token went to (train.routing_replay).

        Raises:
            UserError: one does not.
        """
        for engine in self.engines:
            info = self.run(self._insist(engine.client.server_info))
            if not info.get("enable_return_routed_experts"):
                raise UserError(
                    f"train.routing_replay: {engine.url} does not tell which experts a token went "
                    "to; start SGLang with --enable-return-routed-experts"
                )

    # ---- weights ----

    @property
    def trainer_address(self) -> str:
        """Where engines find this process, for the group of sync=distributed."""
        here = all(urlsplit(engine.url).hostname in LOOPBACK for engine in self.engines)
        return "127.0.0.1" if here else own_address()

    def await_alive(self) -> None:
        """Wait until one engine answers.

        Raises:
            ServerUnavailable: none did in time; says what became of each.
        """
        deadline = time.monotonic() + self.config.start_timeout_s
        while not self.alive():
            if time.monotonic() > deadline:
                raise self.lost("no rollout engine is left")
            time.sleep(0.1)

    def begin_each(
        self, engines: Sequence[Engine], call: Callable[[Engine], Awaitable[Any]]
    ) -> Callable[[], None]:
        """Start `call` on those of the engines that live; the returned function waits for all.

        An engine whose call fails or is late is down from then on.
        """

        async def one(engine: Engine) -> None:
            with _failing(engine):
                async with asyncio.timeout(self.config.sync_timeout_s):
                    await self._insist(call, engine)

        async def every() -> None:
            await asyncio.gather(*(one(e) for e in engines if e.state != "down"))

        started = asyncio.run_coroutine_threadsafe(every(), self.loop)
        return lambda: started.result(LONG_S)

    def each(self, engines: Sequence[Engine], call: Callable[[Engine], Awaitable[Any]]) -> None:
        """`begin_each`, and wait."""
        self.begin_each(engines, call)()

    @property
    def version(self) -> str | None:
        """Of the weights that ready engines have."""
        return self.weights and version_of(self.weights)

    def confirm(self, engines: Sequence[Engine], name: str) -> None:
        """Ask what weights they have; those that have `name` are ready, all others stale."""
        for engine in self.alive():
            engine.state = "stale"
        self.weights = name
        self.each(engines, lambda engine: self._confirm(engine, name))

    async def _confirm(self, engine: Engine, name: str) -> None:
        info = await engine.client.model_info()
        found = info["weight_version"]
        if found != name:
            raise RolloutError(f"reports weight version {found!r} after {name!r}")
        engine.weight_loads = info.get("weight_loads")
        engine.state = "ready"

    # ---- samples ----

    async def generate(self, requests: Sequence[SampleRequest]) -> list[Generation]:
        """Samples from whichever engine has most room; on the engines' loop.

        What fails or is malformed is counted and asked for again, elsewhere if possible.

        Raises:
            WeightsNeeded: engines live, but have missed weights.
            ServerUnavailable, MalformedAnswer: no good answer in `retries + 1` attempts.
            RequestRefused: 4xx.
        """
        async for attempt in retrying(self.config.retries):
            engine = await self._pick()  # its errors are final: it has waited
            with attempt:
                return await self._generate_at(engine, requests)
        raise AssertionError("tenacity ends by returning or raising")

    async def _generate_at(
        self, engine: Engine, requests: Sequence[SampleRequest]
    ) -> list[Generation]:
        engine.in_flight += len(requests)
        try:
            made = await self._asked_of(self._router_client or engine.client, requests)
            return self._with_versions(engine, made)
        except MalformedAnswer:
            self.counts["faults_malformed"] += 1
            raise
        except ServerUnavailable as error:
            self.counts["faults_retries"] += 1
            if not await engine.client.health():
                engine.fail(error)
            raise
        finally:
            engine.in_flight -= len(requests)

    async def _asked_of(
        self, client: SGLangClient, requests: Sequence[SampleRequest]
    ) -> list[Generation]:
        return await client.generate([self._with_own_rid(request) for request in requests])

    def _with_own_rid(self, request: SampleRequest) -> SampleRequest:
        """The request under an id that no server has seen: `PREFIX-step-12-40-3-907`.

        A server refuses an id that is in flight, and may still hold what was given up: an attempt
        that timed out, the requests of a start that was killed, those of another run.
        """
        named = "-".join(
            filter(None, (self._rid_prefix, request.rid, str(next(self._rid_numbers))))
        )
        return dataclasses.replace(request, rid=named)

    async def _insist(self, call: Callable[..., Awaitable[T]], *arguments: Any) -> T:
        """`call(*arguments)`, asked again as rollout.server.retries says."""
        async for attempt in retrying(self.config.retries):
            with attempt:
                return await call(*arguments)
        raise AssertionError("tenacity ends by returning or raising")

    async def abort(self, rid: str) -> None:
        """End those of this run's requests whose ids began with `rid`; on the engines' loop."""
        begins = f"{self._rid_prefix}-{rid}"
        await asyncio.gather(
            *(self._insist(engine.client.abort, begins) for engine in self.ready())
        )

    def _with_versions(self, engine: Engine, made: Sequence[Generation]) -> list[Generation]:
        """The same, with versions in place of the weights' names.

        Raises:
            MalformedAnswer: not made by the weights that the engine was given.  They do not change
                while samples are made, so only one name, and one number of loads, can be right.
        """
        names = {name for generation in made for name, _, _ in generation.weight_versions}
        loads = {generation.weight_loads for generation in made}
        behind_router = self._router_client is not None  # any engine may have answered then
        if names - {self.weights} or (loads - {engine.weight_loads} and not behind_router):
            error = MalformedAnswer(
                f"{engine.url}: samples made by weights {sorted(names)}, expected {self.weights!r} "
                "as they were handed over; does someone else use this server?"
            )
            engine.fail(error)  # it gets the weights again
            raise error
        return [
            dataclasses.replace(
                generation,
                weight_versions=tuple(
                    (version_of(name), start, end)
                    for name, start, end in generation.weight_versions
                ),
            )
            for generation in made
        ]

    async def ask_each(self, requests: Sequence[SampleRequest]) -> list[Generation]:
        """The same of every ready engine, one after another; `check_probe` judges them."""
        self._asked = []
        found: list[Generation] = []
        for engine in self.ready():
            with _failing(engine):
                made = await self._insist(self._asked_of, engine.client, requests)
                found += self._with_versions(engine, made)
                self._asked.append(engine)
        return found

    def check_probe(self, gaps: Sequence[Sequence[float]], tolerance: Tolerance) -> bool:
        """Take out engines whose log-probs differ from the trainer's; whether one is left.

        Args:
            gaps: for each sample of the last `ask_each` the difference of every token [nats].
        """
        of_each = len(gaps) // max(len(self._asked), 1)
        for number, engine in enumerate(self._asked):
            own = gaps[number * of_each : (number + 1) * of_each]
            if problem := tolerance.problem([gap for sample in own for gap in sample]):
                engine.fail(MalformedAnswer(problem))
        return bool(self.ready())

    async def _pick(self) -> Engine:
        """The ready engine with most room; waits for one that is being started."""
        deadline = time.monotonic() + self.config.start_timeout_s
        while not self.ready():
            if self.current is None and self.alive():
                raise WeightsNeeded("no engine has the current weights")
            if time.monotonic() > deadline or self.exhausted():
                raise self.lost("no rollout engine is left")
            self._changed.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), WATCH_S)
        return min(self.ready(), key=lambda engine: engine.in_flight)

    def exhausted(self) -> bool:
        """All are down, and none may be started again."""
        return self.counts["faults_restarts"] >= self.config.max_restarts and all(
            e.state == "down" and e.process is not None and not e.process.alive()
            for e in self.engines
        )

    def lost(self, what: str) -> ServerUnavailable:
        """The error that ends the run, with what is known of every engine."""
        problems = "\n".join(engine.problem for engine in self.engines if engine.problem)
        return ServerUnavailable(
            f"{what} ({self.counts['faults_restarts']} restarts, "
            f"rollout.server.max_restarts={self.config.max_restarts}):\n{problems}"
        )


def name_of(version: str) -> str:
    """A name for weights as they are handed over once, such as `12~9f86d081884c7d65`: nobody else
    who loads a version 12 gives it the same name."""
    return f"{version}~{secrets.token_hex(8)}"


def version_of(name: str) -> str:
    return re.sub("~[0-9a-f]{16}$", "", name)


@contextmanager
def _failing(engine: Engine) -> Iterator[None]:
    """Marks an engine as down if the block fails for the engine's reasons."""
    try:
        yield
    except (RolloutError, TimeoutError) as error:
        engine.fail(error)
