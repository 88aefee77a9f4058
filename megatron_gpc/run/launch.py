"""Start the ranks of a run on this machine and watch them."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from megatron_gpc.errors import UserError
from megatron_gpc.run.child import Child, own_search_path
from megatron_gpc.run.files import read_json
from megatron_gpc.run.network import free_port
from megatron_gpc.run.placement import Share
from megatron_gpc.run.say import say, unheard
from megatron_gpc.run.stop import SAVED, held

LAST_WORDS_S = 3.0
"""After the first failure: how long the other ranks may take to say what they saw and end [s]."""
STACKS_S = 15.0
"""How long ranks may take to write their stacks [s]."""
QUIET_S = 0.5
"""Stacks that did not grow for so long are whole, if the rank had a processor meanwhile [s]."""
STACKS_SIGNAL = signal.SIGUSR2
"""Has a rank write the stacks of its threads to its `stacks_file` and go on."""
CHILD_POLL_S = 0.02
OUTCOME_FD = "GPC_OUTCOME_FD"
"""In a rank's environment: the file descriptor where `outcome` goes."""

MAIN_RANK_FAILED = "the main rank failed"
"""What the others say then (mcore/main_rank.py)."""
# What an error says if a peer had gone (gloo, the store, NCCL), or if it never came.
_LOST_A_PEER = (
    MAIN_RANK_FAILED,
    *("caused by a remote worker crashing", "Connection reset by peer", "Broken pipe"),
    *("got 0 bytes", "remote process exited", "ncclRemoteError", "Timed out waiting"),
)
_SPEAK_FOR_THEMSELVES = ("UserError: ", "RunStopped: ")
_FRAME = re.compile(r'File "(.+)", line (\d+),? in (\S+)')


def run_ranks(
    arguments: Sequence[str],
    share: Share,
    log_dir: Path,
    module: str = "megatron_gpc",
    pass_on: Sequence[signal.Signals] = (),
) -> int:
    """Run `python -m MODULE ARGUMENTS` as some ranks; the first to fail ends the others.

    Rank 0 writes to this terminal, the others to log_dir/rank_N.log.  At the end stands what the
    rank that failed first said: torch.distributed.elastic's `record`, around a rank's work, leaves
    it where TORCHELASTIC_ERROR_FILE says, as it does for torchrun.

    Args:
        arguments: of every rank.
        share: which ranks.
        log_dir: for what they say.
        module: what they run.
        pass_on: signals to this process that are for the ranks.  They start with these blocked.

    Returns:
        0; SAVED if the ranks were asked to end and did; or the exit code of the rank that failed
        first (1 if a signal ended it).  If there are signals to pass on, the ranks are a run's, and
        one that ends with 0 or SAVED without its `outcome` has failed.

    Raises:
        KeyboardInterrupt: SIGINT is passed on and came a second time; the ranks were killed.
    """
    log_dir.mkdir(parents=True, exist_ok=True)
    numbers = range(share.first, share.first + share.ranks)
    for number in numbers:
        for old in log_dir.glob(f"rank_{number}.*"):
            old.unlink()
    master = share.master or ("127.0.0.1", free_port())
    started: list[Rank] = []
    with held(pass_on), _noted_interrupts(pass_on) as asked:
        if pass_on:  # a run, not a script's helpers; from here on these signals are for the ranks
            say(f"starting {share.ranks} of {share.world} ranks, logs in {log_dir}")
        try:
            for number in numbers:
                command = [module, *arguments]
                started.append(Rank(number, share, master, log_dir, command, bool(pass_on)))
            failed = _watch(started, pass_on, asked)
        except KeyboardInterrupt:
            for rank in started:  # at once: their stacks are of no interest then
                rank.process.kill()
            raise
        finally:
            _end(started)
            while signal.sigtimedwait(pass_on, 0):  # signals that came too late are dropped
                pass
    if not failed:
        return max(rank.process.returncode for rank in started)
    first = min(failed, key=Rank.innocence)
    _report(first, started)
    return first.exit_code()


def outcome(code: int) -> int:
    """Called by a rank once its work is over: the launcher may now take its exit code for what it
    says.  A part of the user's, or a library, may end the process with 0 as well."""
    with suppress(KeyError, ValueError, OSError):  # another launcher has started it
        os.write(int(os.environ.pop(OUTCOME_FD)), b".")
    return code


@contextmanager
def _noted_interrupts(pass_on: Sequence[signal.Signals]) -> Iterator[list[int]]:
    """A list that SIGINT is added to, if it is to be passed on.

    Held back in this thread it may still reach one that a library has started before.
    """
    asked: list[int] = []
    if signal.SIGINT not in pass_on:
        yield asked
        return
    before = signal.signal(signal.SIGINT, lambda number, _: asked.append(number))
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


class Rank(Child):
    """One process of a run, and what it leaves behind in log_dir.

    Args:
        says: it says by `outcome` that it is done.
    """

    def __init__(
        self,
        number: int,
        share: Share,
        master: tuple[str, int],
        log_dir: Path,
        command: Sequence[str],
        says: bool,
    ):
        self.number, self._says = number, says
        self.error = log_dir / f"rank_{number}.error.json"
        self.stacks = stacks_file(log_dir, number)
        self.failed_at = 0.0
        """When it failed, as far as is known [s since 1970]; 0 if it has not failed."""
        self._stacks_seen = 0, 0.0
        """Size when they last grew [bytes], and what the rank had computed by then [s of CPU]."""
        self.state = ""
        """What the kernel said of it before it was ended, if that tells anything."""
        self._outcome, writer = os.pipe()
        os.set_blocking(self._outcome, False)
        super().__init__(
            [sys.executable, "-P", "-m", *command],  # see own_search_path
            {
                # One thread a rank: ranks share the cores.
                "OMP_NUM_THREADS": "1",
                **os.environ,
                "PYTHONPATH": own_search_path(),
                "RANK": str(number),
                "LOCAL_RANK": str(number - share.first),
                "WORLD_SIZE": str(share.world),
                "MASTER_ADDR": master[0],
                "MASTER_PORT": str(master[1]),
                "TORCHELASTIC_ERROR_FILE": str(self.error),
                OUTCOME_FD: str(writer),
            },
            log_dir / f"rank_{number}.log" if number > 0 else None,
            pass_fds=[writer],
        )
        os.close(writer)

    def has_failed(self) -> bool:
        """Whether it has ended badly, or has written down that it is about to."""
        if not self.failed_at:
            if self.error.exists():
                self.failed_at = self.error.stat().st_mtime
            elif self.process.poll() is not None and (not self.may_end_so() or self.left_early()):
                self.failed_at = time.time()
        return bool(self.failed_at)

    def may_end_so(self) -> bool:
        return self.process.returncode in (0, SAVED)

    def left_early(self) -> bool:
        """Whether it has ended as one does that is done, and was not."""
        if self._says and self.may_end_so():
            with suppress(BlockingIOError):  # a process that it has forked may hold the other end
                self._says = not os.read(self._outcome, 1)
        return self._says and self.may_end_so()

    def said(self) -> tuple[str, str]:
        """(error, traceback) as `record` wrote them, or else the end of the log for both."""
        return self.recorded() or (self.last_words(), self.last_words())

    def recorded(self) -> tuple[str, str] | None:
        """What `record` wrote; None if there is none, or half of it, as on a disk that is full."""
        try:
            message = read_json(self.error)["message"]
            return message["message"], message["extraInfo"]["py_callstack"]
        except (OSError, UserError, LookupError, TypeError):
            return None

    def innocence(self) -> tuple[int, float]:
        """Orders ranks that failed, the likeliest cause first; among equals by time.

        Times alone would not do: one look may find a rank that was killed and its victims.
        """
        error, _ = self.said()
        if self.has_the_last_word():  # of several rank 0, whose words stand on the terminal
            return 1, self.failed_at if self.log else 0.0
        if self.was_killed() or self.is_silent() or self.left_early():
            return 0, self.failed_at
        lost_a_peer = any(words in error for words in _LOST_A_PEER)
        on_terminal = self.log is None and not self.recorded()  # nothing others say explains more
        return 2 if lost_a_peer or not error else 1, 0.0 if on_terminal else self.failed_at

    def was_killed(self) -> bool:
        """Whether a signal ended it, but for SIGABRT, which also ends ranks that lost a peer."""
        code = self.process.returncode
        return code < 0 and code != -signal.SIGABRT and not self.error.exists()

    def has_the_last_word(self) -> bool:
        """Whether it ended by a user's error that it could not write down, the disk being full, but
        has said."""
        return self.process.returncode == 2 and not self.recorded()

    def exit_code(self) -> int:
        """Its exit code: 2 for a user's error, 1 if a signal ended it."""
        code = 1 if self.may_end_so() else max(self.process.returncode, 1)
        return 2 if self.said()[0].startswith("UserError: ") else code

    def where(self) -> str:
        """The line that its main thread was at in the end, and whether it was stopped."""
        if self.stacks.exists():  # threads newest first, each with the innermost call first
            threads = self.stacks.read_text().split("(most recent call first):")
            # A watchdog that ends a rank while it writes on request leaves a last part empty.
            frames = next(filter(None, map(_FRAME.findall, reversed(threads))), [])[:1]
        else:
            frames = _FRAME.findall(self.said()[1])[-1:]
        place = "".join("{}:{} in {}".format(*frame) for frame in frames) or "unknown"
        return f"{place} ({self.state})" if self.state else place

    def has_written_stacks(self) -> bool:
        """Whether they have not grown since the last look, and not because it was not its turn: on
        a busy machine a rank may wait for seconds in the middle of a line."""
        size, used = (
            self.stacks.stat().st_size,
            sum(psutil.Process(self.process.pid).cpu_times()[:2]),
        )
        if size != self._stacks_seen[0]:
            self._stacks_seen = size, used
            return False
        rests = not {"R", "D", "T"} & set(_thread_states(self.process.pid))
        return size > 0 and (rests or used - self._stacks_seen[1] > QUIET_S / 2)

    def is_silent(self) -> bool:
        """Whether its watchdog ended it."""
        return self.stacks.exists() and self.stacks.read_text().startswith("Timeout (")


def stacks_file(log_dir: Path, rank: int) -> Path:
    """Where a rank writes the stacks of its threads; absent while there is nothing to tell."""
    return log_dir / f"rank_{rank}.stacks"


def _watch(
    ranks: Sequence[Rank], pass_on: Sequence[signal.Signals], asked: list[int]
) -> list[Rank]:
    """Wait until all have ended well or one has not; those that failed of themselves.

    Args:
        asked: signals that came by another way than `pass_on`.

    Raises:
        KeyboardInterrupt: see `run_ranks`.
    """
    interrupted = False
    while not any([rank.has_failed() for rank in ranks]):
        if all(rank.process.returncode is not None for rank in ranks):
            return []
        time.sleep(CHILD_POLL_S)
        # Never with a time: if SIGSTOP interrupts that, CPython 3.11 makes up a signal at SIGCONT.
        if (one := signal.sigtimedwait(pass_on, 0)) is not None:
            asked.append(one.si_signo)
        while asked:
            number = asked.pop(0)
            if number == signal.SIGHUP:
                unheard()
            if interrupted and number == signal.SIGINT:
                raise KeyboardInterrupt
            interrupted = interrupted or number == signal.SIGINT
            for rank in ranks:
                rank.process.send_signal(number)
    deadline = time.monotonic() + LAST_WORDS_S
    while any([rank.process.poll() is None for rank in ranks]) and time.monotonic() < deadline:
        for rank in ranks:
            rank.has_failed()  # notes when
        time.sleep(CHILD_POLL_S)
    return [rank for rank in ranks if rank.has_failed()]


def _end(ranks: Sequence[Rank]) -> None:
    """End what still runs.  It may hang: what it is doing is asked for first."""
    running = [rank for rank in ranks if rank.process.poll() is None]
    for rank in running:
        state = psutil.Process(rank.process.pid).status()
        if state in (psutil.STATUS_STOPPED, psutil.STATUS_DISK_SLEEP):
            rank.state = state
        rank.process.send_signal(STACKS_SIGNAL)
        rank.process.send_signal(signal.SIGCONT)
    if running:
        _await_stacks(running)
    for rank in running:
        rank.process.kill()  # SIGTERM would ask it to save, which it cannot do without its peers
        rank.process.wait()


def _await_stacks(ranks: Sequence[Rank]) -> None:
    """Wait until all that have begun to watch themselves have written where they are."""
    deadline = time.monotonic() + STACKS_S
    while time.monotonic() < deadline:
        alive = [rank for rank in ranks if rank.process.poll() is None and rank.stacks.exists()]
        if all([rank.has_written_stacks() for rank in alive]):
            return
        time.sleep(QUIET_S)


def _thread_states(pid: int) -> Iterator[str]:
    """What the kernel says of each thread of a process: R, S, D, T..."""
    for file in Path(f"/proc/{pid}/task").glob("*/stat"):
        with suppress(OSError):  # the thread has ended
            yield file.read_text().rpartition(")")[2].split()[0]


def _report(first: Rank, ranks: Sequence[Rank]) -> None:
    """Say why the run ended; rank 0's own words stand on the terminal already."""
    if first.has_the_last_word() and not first.log:
        return
    error, traceback = first.said()
    if error.startswith(_SPEAK_FOR_THEMSELVES):
        if ranks[0].log or error != ranks[0].said()[0]:
            say(f"rank {first.number}: {error.partition(': ')[2]}")
    elif first.left_early():
        say(
            f"rank {first.number} ended with exit code {first.process.returncode} before the run "
            "was over: a part of yours or a library has ended the process"
        )
    elif first.is_silent():
        say(
            f"rank {first.number} ended the run: no sign of life for guard.silent_minutes; the "
            f"stacks of all threads: {first.stacks.with_name('rank_*.stacks')}"
        )
        for rank in ranks:
            print(f"  rank {rank.number}: {rank.where()}", file=sys.stderr)
    else:
        code = first.process.returncode
        how = f", ended by {signal.Signals(-code).name}" if first.was_killed() else ""
        if first.log and traceback:
            say(f"what rank {first.number} said, the end of {first.log}:")
            print(traceback, file=sys.stderr)
        lines = error.strip().splitlines() or [""]
        reason = lines[0 if first.recorded() else -1]  # a log ends with what happened last
        words = reason or ("it had said nothing" if first.log else "what it said stands above")
        say(f"rank {first.number} failed first{how}: {words}")
