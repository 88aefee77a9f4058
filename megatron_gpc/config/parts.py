"""Parts that a user brings: a reward, a loss, a schedule, a sink, each found by its name.

A name is that of a built-in part, or `package.module:name`, or `path/to/file.py:name`.  A file is
imported as the module `megatron_gpc.config.parts.STEM_HEX`, where HEX spells its absolute path.  So
the same file has the same module name in every process, and any process can import it, which pickle
relies on when it takes a user's function to a worker.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import os
import re
import sys
import traceback
from asyncio import CancelledError
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from threading import current_thread, main_thread
from types import ModuleType
from typing import Any, NoReturn

from megatron_gpc.config.file import keys
from megatron_gpc.errors import PartError, UserError

WANTED = {
    "data.verifier": "a function of (text, label), the answer and the prompt's label, or of (text, "
    "label, prompt), which gives a number",
    "train.loss": "a function of (inputs), or a class whose objects are, which gives LossOutputs "
    "with a sum over tokens",
    "clip.schedule": "a class of (clip, steps) with the methods bounds(k, entropy), state() and "
    "restore(state)",
    "log.sinks": "a class of (run_dir, config, resume_step) with the methods write(step, values), "
    "write_evaluation(step, values) and close(ok)",
}
"""What a part of the user's has to be, for messages."""

_RAISED = (Exception, SystemExit, GeneratorExit)
"""What a file of the user's may raise while it is imported."""
__path__: list[str] = []  # lets the import system look for modules below this one


def find(key: str, name: str, built_in: Mapping[str, Any]) -> Any:
    """The callable that a configuration's key names.

    Args:
        key: the key, for messages: `clip.schedule`.
        name: its value.
        built_in: the project's own parts by name.

    Raises:
        UserError: module, file or name is missing, importing it fails, or it cannot be called.
    """
    if name in built_in:
        return built_in[name]
    global _process  # noqa: PLW0603 - os._exit is as global
    os._exit, _process = _exit_of_a_part, os.getpid()
    source, _, path = name.rpartition(":")
    found: Any = _module(key, source)
    for attribute in path.split("."):
        try:
            missing = not hasattr(found, attribute)
            near = difflib.get_close_matches(attribute, dir(found), n=1) if missing else []
            found = getattr(found, attribute, None)
        except _RAISED as error:  # a module's, or a class's, own __getattr__
            raise UserError(f"{key}: {name} cannot be looked up: {describe(error)}") from error
        if missing:
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UserError(f"{key}: {source} has no {attribute!r}{hint}")
    if not callable(found):
        raise UserError(f"{key}: {name} is {found!r}, which cannot be called")
    return found


def _exit_of_a_part(code: int) -> NoReturn:
    """What os._exit is once there is a part of the user's: in this process it is exit(), which
    `blamed` hears; or a run, a check, an evaluation would end with 0 and without a word."""
    if os.getpid() == _process:
        raise SystemExit(code)
    _leave(code)


_leave, _process = os._exit, 0
"""os._exit itself, which ends what is forked, and the process that it does not end."""


def wanted(key: str, name: str) -> str:
    """The end of a message about a part of the user's that is something else."""
    own = ":" in name and key in WANTED
    return f"; wanted is {WANTED[key]} (docs/extend.md)" if own else ""


def check_methods(
    key: str,
    name: str,
    part: Any,
    methods: Mapping[str, Sequence[str]],
    bound: Sequence[str] = (),
) -> None:
    """Refuse a part without these methods, or with others of their names.

    Args:
        methods: what we pass, by method.
        bound: `self`, if `part` is a class.

    Raises:
        UserError: names the method.
    """
    for method, positional in methods.items():
        found = getattr(part, method, None)
        if not callable(found):
            has = f"{key}: {name} has no method {method}({', '.join(positional)})"
            raise UserError(has + wanted(key, name))
        check_call(key, f"{name}.{method}", found, (*bound, *positional), {})


def check_call(
    key: str, name: str, part: Any, positional: Sequence[str], arguments: Mapping[str, Any]
) -> None:
    """Refuse a part that cannot be called with these positional arguments and keywords.

    Args:
        positional: what we pass, by the names that messages give it.
        arguments: what the configuration's KEY_arguments holds.

    Raises:
        UserError: its signature does not fit.
    """
    try:
        signature = inspect.signature(part)
    except (TypeError, ValueError):  # written in C, and silent about its parameters
        return
    try:
        signature.bind(*positional, **arguments)
    except TypeError as error:
        passed = ", ".join((*positional, *(f"{field}=" for field in arguments)))
        raise UserError(
            f"{key}: {name} takes {signature}, but is called with ({passed}): {error}; "
            f"what is passed by keyword is set in {key}_arguments"
            f"{_keys_of_that_name(key, arguments)}{wanted(key, name)}"
        ) from None


def _keys_of_that_name(key: str, arguments: Mapping[str, Any]) -> str:
    """For arguments that a part does not take: the configuration may have them as keys."""
    section, there = key.partition(".")[0], keys()
    names = (f"{near}.{name}" for name in arguments for near in (section, "clip"))
    found = next((name for name in names if name in there), None)
    return f"; {found} is a key of its own" if found else ""


@contextlib.contextmanager
def blamed(key: str, name: str, doing: str) -> Iterator[None]:
    """Around a call of a user's part: its errors name the part and keep their traceback.

    Args:
        doing: what it was asked, such as `bounds of step 3`.

    Raises:
        PartError: the part raised an exception, or called exit() or os._exit().
        UserError: the part raised one, which says by itself what to do.
    """
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit, CancelledError, KeyboardInterrupt) as error:
        if isinstance(error, KeyboardInterrupt) and current_thread() is main_thread():
            raise  # Ctrl-C is not the part's
        source = name.rpartition(":")[0]
        folder = Path(source).parent if source.endswith(".py") else None
        raise PartError(f"{key}: {name} failed at {doing}: {describe(error, folder)}") from error


def describe(error: BaseException, near: Path | None = None) -> str:
    """`ValueError: why (file.py, line 3)`: the last line of a traceback, and where it happened.

    Args:
        near: of the calls that led there, the innermost in a file of this folder is named; without
            it, or if there is none, the innermost of all.
    """
    last = traceback.format_exception_only(error)[-1].strip()
    last = " ".join(last.split())
    if isinstance(error, SyntaxError):
        return f"{last} ({error.filename}, line {error.lineno})"
    calls = traceback.extract_tb(error.__traceback__)
    own = [call for call in calls if near and Path(call.filename).is_relative_to(near)]
    for call in reversed(own or calls):
        return f"{last} ({call.filename}, line {call.lineno})"
    return last


def short(name: str) -> str:
    """A part's name for labels: a file without its folder."""
    return name.rpartition("/")[2]


def _module(key: str, source: str) -> ModuleType:
    """The module or the file `source`, imported."""
    if source.endswith(".py"):
        file = Path(source).absolute()
        if not file.is_file():
            is_not = "is no file" if file.exists() else "is not there"
            raise UserError(f"{key}: {file} {is_not}; name the file of your part")
        stem = re.sub(r"\W", "_", file.stem)
        module = f"{__name__}.{stem}_{str(file).encode().hex()}"
        folder, path = file.parent, contextlib.nullcontext()  # _FileLoader sees to it
    else:
        module, folder = source, Path.cwd()
        path = _importable(folder, first=False)
    try:
        with path:
            return importlib.import_module(module)
    except _RAISED as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing and f"{module}.".startswith(f"{missing}."):
            raise UserError(
                f"{key}: there is no module {missing!r}; install it, put its folder into "
                "PYTHONPATH, or name the file: path/to/file.py:name"
            ) from None
        why = describe(error, folder)
        raise UserError(f"{key}: {source} cannot be imported: {why}") from error


@contextlib.contextmanager
def _importable(folder: Path, first: bool) -> Iterator[None]:
    """Modules in this folder can be imported, before all others or after them."""
    sys.path.insert(0 if first else len(sys.path), str(folder))
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # the part has removed it
            sys.path.remove(str(folder))


class _FileLoader(importlib.machinery.SourceFileLoader):
    """Files beside a user's file can be imported while that one is."""

    def exec_module(self, module: ModuleType) -> None:
        with _importable(Path(self.path).parent, first=True):
            super().exec_module(module)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds `megatron_gpc.config.parts.STEM_HEX` in the file that HEX spells."""

    def find_spec(
        self, fullname: str, path: object, target: object = None
    ) -> importlib.machinery.ModuleSpec | None:
        parent, _, name = fullname.rpartition(".")
        spelled = re.fullmatch(r".*_((?:[0-9a-f]{2})+)", name)
        if parent != __name__ or not spelled:
            return None
        file = bytes.fromhex(spelled[1]).decode(errors="replace")
        return importlib.util.spec_from_file_location(
            fullname, file, loader=_FileLoader(fullname, file)
        )


sys.meta_path.append(_Finder())
