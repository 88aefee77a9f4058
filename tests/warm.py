"""Our programs start as forks of a process that has imported all they need: 0.1 s, not 5.

`install()` replaces subprocess.Popen.  Programs of ours it gets from a launch pad, a process with
one thread that has done nothing but import; everything else is started as ever.  The new process is
a child of whoever called Popen and finds what it would find after exec: arguments, environment (in
/proc too), folder, files, session, signals.  It has a launch pad of its own, forked before it does
anything, for what it starts itself.  Within `cold()` everything is started as users start it.
"""

from __future__ import annotations

import atexit
import ctypes
import inspect
import io
import multiprocessing.util
import os
import pickle
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).parents[1]
START_TIMEOUT_S = 120.0
MODULES = (
    *("megatron_gpc", "megatron_gpc.server", "megatron_gpc.commands.parity"),
    *("failing_ranks", "torch.distributed.run", "pytest"),
)
SCRIPTS = (ROOT / "tools", ROOT / "examples")
TITLE_BYTES = 8192
"""Room for the arguments and for the environment that /proc shows of a fork."""
_leave = os._exit  # a part of a user's may not, and our forks are to end (config/parts.py)
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_libc = ctypes.CDLL(None)
_cold_popen = subprocess.Popen
_EXECUTE = inspect.signature(subprocess.Popen._execute_child)


@dataclass(frozen=True)
class Request:
    """A process to be; the files 0, 1, 2 and `pass_fds` come along with it, in this order."""

    owner: int
    """Pid of its parent."""
    arguments: list[str]
    """What stands behind the interpreter."""
    environment: dict[str, str]
    folder: str
    pass_fds: tuple[int, ...]
    new_session: bool
    before: Any
    """preexec_fn."""
    blocked: set[int]
    ignored: set[int]


def _is_ours(args: Any, preexec_fn: Any) -> bool:
    if isinstance(args, str) or not args or args[0] != sys.executable:
        return False
    if "<" in getattr(preexec_fn, "__qualname__", ""):
        return False  # it cannot be sent
    program = _program(list(map(os.fspath, args[1:])))
    if program[0] == "-m":
        return program[1] in MODULES
    return program[0].endswith(".py") and any(f in Path(program[0]).parents for f in SCRIPTS)


def _program(arguments: list[str]) -> list[str]:
    """Arguments of Python without its own options."""
    while arguments and arguments[0] in ("-P", "-u"):
        arguments = arguments[1:]
    return arguments or [""]


class Popen(subprocess.Popen):
    """A subprocess.Popen whose process is a fork of a launch pad where that can be."""

    def _execute_child(self, *given: Any) -> None:
        call = _EXECUTE.bind(self, *given).arguments
        if _pad.cold or call["shell"] or not _is_ours(call["args"], call["preexec_fn"]):
            return super()._execute_child(*given)
        standard = [call["p2cread"], call["c2pwrite"], call["errwrite"]]
        pass_fds = tuple(call["pass_fds"])
        files = [number if file == -1 else file for number, file in enumerate(standard)]
        environment = os.environ if call["env"] is None else call["env"]
        request = Request(
            owner=os.getpid(),
            arguments=[os.fspath(word) for word in call["args"][1:]],
            environment=dict(environment),
            folder=os.fspath(call["cwd"] or os.getcwd()),
            pass_fds=pass_fds,
            new_session=call["start_new_session"],
            before=call["preexec_fn"],
            blocked=set(map(int, signal.pthread_sigmask(signal.SIG_BLOCK, ()))),
            ignored={s for s in signal.valid_signals() if signal.getsignal(s) == signal.SIG_IGN},
        )
        self.pid = _pad.start(request, [*files, *pass_fds])
        self._child_created = True
        self._close_pipe_fds(
            *(call[name] for name in ("p2cread", "p2cwrite", "c2pread", "c2pwrite")),
            *(call[name] for name in ("errread", "errwrite")),
        )


class Pad:
    """The launch pad of this process; the first use starts it."""

    def __init__(self) -> None:
        self.cold = False
        self.socket: socket.socket | None = None
        self.lock = threading.Lock()

    def start(self, request: Request, files: Sequence[int]) -> int:
        """The pid of a new child of this process."""
        with self.lock:
            if self.socket is None:
                self.socket = _exec_pad()
            _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
            try:
                socket.send_fds(self.socket, [pickle.dumps(request)], list(files))
                answer = self.socket.recv(4096)
            finally:
                _libc.prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
        assert answer.isdigit(), answer or "the launch pad has ended"
        return int(answer)


_pad = Pad()


def install() -> None:
    """From now on, programs of ours start warm; not where a GPU is, which no fork may touch."""
    if not Path("/dev/nvidiactl").exists():
        subprocess.Popen = Popen


@contextmanager
def cold() -> Iterator[None]:
    """Within, everything is started as users start it."""
    _pad.cold = True
    try:
        yield
    finally:
        _pad.cold = False


def _exec_pad() -> socket.socket:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        _cold_popen(
            [sys.executable, __file__, str(theirs.fileno()), "-" * TITLE_BYTES],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
                "ROOM": "-" * TITLE_BYTES,
            },
        )
    ours.settimeout(START_TIMEOUT_S)
    assert ours.recv(64) == b"ready"
    return ours


def _serve(channel: socket.socket) -> NoReturn:
    """Fork what is asked for, until the owner is gone and its end of the channel with it."""
    for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(one, signal.SIG_IGN)  # they are not for this process
    channel.settimeout(None)
    while True:
        data, files, _, _ = socket.recv_fds(channel, 1 << 20, 64)
        if not data:
            _leave(0)
        between = os.fork()
        if not between:
            if os.fork():
                _leave(0)  # so that the owner gets the child
            _become(data, files, channel)
        for file in files:
            os.close(file)
        os.waitpid(between, 0)


def _become(data: bytes, files: list[int], channel: socket.socket) -> NoReturn:
    """In the fork: be the program, and end with it."""
    code = 1
    try:
        try:
            request: Request = pickle.loads(data)
        except BaseException as error:
            channel.send(repr(error).encode())
            raise
        deadline = time.monotonic() + 60
        while os.getppid() != request.owner:
            if time.monotonic() > deadline or not Path(f"/proc/{request.owner}").exists():
                _leave(1)
            time.sleep(0.001)
        channel.send(str(os.getpid()).encode())
        _take_files(files, request.pass_fds)
        if request.new_session:
            os.setsid()
        _fork_pad(request.pass_fds)
        _take_signals(request)
        os.chdir(request.folder)
        os.environ.clear()
        os.environ.update(request.environment)
        _take_title(request)
        if request.before:
            request.before()
        _set_signals_as_python_does()
        code = _run(request.arguments)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        with suppress(BaseException):
            sys.stdout.flush()
        with suppress(BaseException):
            sys.stderr.flush()
        _leave(code)


def _take_files(files: Sequence[int], pass_fds: Sequence[int]) -> None:
    """Have nothing open but what was given, by the numbers that it had.

    The other numbers stay taken, by /dev/null: some object may close its number yet.
    """
    import fcntl

    high = [fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, 1000) for file in files]
    nothing = os.open(os.devnull, os.O_RDWR)
    for name in os.listdir("/proc/self/fd"):
        if int(name) < 1000 and int(name) != nothing:
            with suppress(OSError):
                os.fstat(int(name))
                os.dup2(nothing, int(name), inheritable=False)
    for number, file in zip((0, 1, 2, *pass_fds), high, strict=True):
        os.dup2(file, number)
        os.close(file)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = io.TextIOWrapper(
        io.FileIO(2, "w", closefd=False), errors="backslashreplace", line_buffering=True
    )
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr


def _fork_pad(pass_fds: Sequence[int]) -> None:
    """Give this process a launch pad of its own, while it is as good as new."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if not os.fork():
        ours.close()
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        for number in (0, 1, 2, *pass_fds):
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
        _serve(theirs)
    theirs.close()
    _pad.socket, _pad.lock = ours, threading.Lock()
    subprocess.Popen = Popen


def _take_signals(request: Request) -> None:
    for one in signal.valid_signals():
        with suppress(OSError, ValueError):
            ignored = one in request.ignored
            signal.signal(one, signal.SIG_IGN if ignored else signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, request.blocked)


def _set_signals_as_python_does() -> None:
    """When it starts."""
    for one in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(one, signal.SIG_IGN)
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _take_title(request: Request) -> None:
    """Have /proc show these arguments and this environment, RANK first, as far as there is room.

    Nothing reads the memory that they are in any more: os.environ has just moved elsewhere.
    """
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    arguments, arguments_end, variables, variables_end = map(int, fields[45:49])
    words = [sys.executable, *request.arguments]
    rank = {name: v for name, v in request.environment.items() if name == "RANK"}
    shown = [f"{name}={v}" for name, v in (rank | request.environment).items()]
    for start, end, texts in (
        (arguments, arguments_end, words),
        (variables, variables_end, shown),
    ):
        text = b"".join(os.fsencode(one) + b"\0" for one in texts)[: end - start - 1]
        ctypes.memset(start, 0, end - start)
        ctypes.memmove(start, text, len(text))


def _run(arguments: list[str]) -> int:
    """Run a module or a script as the interpreter would; its exit code."""
    atexit._clear()
    weakref.finalize._registry.clear()
    atexit.register(multiprocessing.util._exit_function)
    program = _program(arguments)
    own = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = [*own, *_BASE_PATH]
    try:
        if program[0] == "-m":
            if "-P" not in arguments:
                sys.path.insert(0, os.getcwd())
            sys.argv = program[1:]
            if not hasattr(sys.modules.get(program[1]), "__path__"):
                sys.modules.pop(program[1], None)
            runpy.run_module(program[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = program
            sys.path.insert(0, str(Path(program[0]).parent))
            runpy.run_path(program[0], run_name="__main__")
        code: Any = 0
    except SystemExit as left:
        code = left.code
    except KeyboardInterrupt:
        sys.excepthook(*sys.exc_info())
        code = 130
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    if isinstance(code, str):
        print(code, file=sys.stderr)
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    return int(code or 0)


def main() -> None:
    """Be the launch pad of a process that runs tests."""
    import warm  # what is unpickled is of that name, not of __main__
    import warm_imports  # noqa: F401 - freezes what it has imported

    channel = socket.socket(fileno=int(sys.argv[1]))
    channel.send(b"ready")
    warm._BASE_PATH = [path for path in sys.path if path not in _OWN]
    warm._serve(channel)


_OWN = (str(ROOT), str(ROOT / "tests"))
_BASE_PATH: list[str] = []

if __name__ == "__main__":
    main()
