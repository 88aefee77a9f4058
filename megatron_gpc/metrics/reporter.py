"""A run's numbers and words: the console and every configured sink behind one object."""

from __future__ import annotations

import queue
import threading
import traceback
from collections.abc import Callable, Mapping
from types import TracebackType

from megatron_gpc.config import Config, parts
from megatron_gpc.errors import PartError, UserError
from megatron_gpc.metrics.console import Console
from megatron_gpc.metrics.reach import Reach
from megatron_gpc.metrics.sinks import SINKS_KEY, MetricSink, make_sink, shown
from megatron_gpc.metrics.tables import print_table, summary_table
from megatron_gpc.run.say import say
from megatron_gpc.run.stop import mark

SINK_CLOSE_S = 60.0
"""How long a sink may take to pass on what it has when the run ends [s] ..."""
SINK_CLOSE_FAILED_S = 5.0
"""... and when it ends by an error, which others wait to see."""

Warn = Callable[[str], None]


class Reporter:
    """Shows a run and writes down its metrics; rank 0 has one, as a context.

    metrics.jsonl is written before a call returns, and the run ends if that fails.  Every other
    sink has a thread of its own: it may fail or hang, and the run goes on.

    Args:
        config: the run.
        resume_step: finished steps of the checkpoint that it continues from.

    Raises:
        UserError, PartError: a sink cannot be started.  If the run is being continued that is a
            warning, but for metrics.jsonl.
    """

    def __init__(self, config: Config, resume_step: int):
        self.config = config
        self._console = Console(config.train.steps, resume_step)
        self._reach = Reach()
        self._direct: list[MetricSink] = []
        self._behind: list[_Behind] = []
        for name in config.log.sinks:
            try:
                sink = make_sink(config.log, name, config.run_dir, shown(config), resume_step)
            except (UserError, PartError) as error:
                if resume_step == 0 or name == "jsonl":
                    self.__exit__(type(error), error, None)
                    raise
                self.warn(f"{error}; the run goes on without it")
                continue
            if name == "jsonl":
                self._direct.append(sink)
            else:
                self._behind.append(_Behind(name, sink, self.warn))

    def __enter__(self) -> Reporter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._console.close()
        ok = error is None
        for behind in self._behind:
            behind.close(ok)
        for behind in self._behind:
            behind.join(SINK_CLOSE_S if ok else SINK_CLOSE_FAILED_S)
        for sink in self._direct:
            sink.close(ok)

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Training step `step` has ended."""
        for sink in (*self._direct, *self._behind):
            sink.write(step, values)
        self._console.step(step, values)
        if trouble := self._reach.step(step, values):
            self.warn(trouble)

    def evaluation(self, step: int, values: Mapping[str, float]) -> None:
        """The policy has been evaluated after `step` finished steps."""
        for sink in (*self._direct, *self._behind):
            sink.write_evaluation(step, values)

    def warn(self, text: str) -> None:
        """A line that stays and stands out."""
        self._console.warn(text)

    def stopped(self, step: int) -> None:
        """The run was asked to end, has done so after `step`, and can be continued."""
        self._console.close()
        mark(self.config.run_dir, step)
        say(f"stopped after step {step}, everything is saved; the same command continues")

    def finish(self) -> None:
        """Draw the run and print its table, both from metrics.jsonl."""
        self._console.close()
        if "jsonl" not in self.config.log.sinks:
            return
        if self.config.plots:
            from megatron_gpc.metrics.plots import plot_run  # matplotlib: 1 s, and only here

            plot_run(self.config.run_dir)
        print_table(summary_table(self.config.run_dir))


class _Behind:
    """A sink in a thread of its own; its first error is a warning, with the user's traceback."""

    def __init__(self, name: str, sink: MetricSink, warn: Warn):
        self._name, self._sink, self._warn = name, sink, warn
        self._jobs: queue.SimpleQueue[tuple[str, Callable[[], None]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=f"sink {name}", daemon=True)
        self._thread.start()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        kept = dict(values)
        self._jobs.put((f"write(step={step})", lambda: self._sink.write(step, kept)))

    def write_evaluation(self, step: int, values: Mapping[str, float]) -> None:
        kept, doing = dict(values), f"write_evaluation(step={step})"
        self._jobs.put((doing, lambda: self._sink.write_evaluation(step, kept)))

    def close(self, ok: bool) -> None:
        self._jobs.put((f"close(ok={ok})", lambda: self._sink.close(ok)))
        self._jobs.put(None)

    def join(self, timeout_s: float) -> None:
        """Wait until the sink has taken everything, up to a deadline."""
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self._warn(f"{SINKS_KEY}: {self._name} has not taken everything after {timeout_s:g} s")

    def _work(self) -> None:
        warned = False
        while (job := self._jobs.get()) is not None:
            doing, call = job
            try:
                with parts.blamed(SINKS_KEY, self._name, doing):
                    call()
            except (PartError, UserError) as error:
                if not warned:
                    own = "".join(traceback.format_exception(error.__cause__ or error))
                    trace = f"\n{own.rstrip()}" if ":" in self._name else ""
                    self._warn(f"{error}; the run goes on, and this sink warns once{trace}")
                warned = True
