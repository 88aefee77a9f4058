"""What one rank does for all of them: the same call everywhere."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, suppress
from types import TracebackType
from typing import NoReturn, ParamSpec, TypeVar, cast

from megatron_gpc.errors import RunStopped, UserError
from megatron_gpc.mcore.setup import from_main, is_main
from megatron_gpc.run.launch import MAIN_RANK_FAILED

T = TypeVar("T")
P = ParamSpec("P")
Item = TypeVar("Item")


class MainRank:
    """Has the main rank do what only it can do; every rank has one, as a context.

    Every method is a collective.  What a call gives, all ranks get; what it raises, all raise.  The
    main rank first closes all that it has entered (engines, users' sinks), and then tells the
    others, which end when they hear of it.

    >>> with MainRank() as main:
    ...     sampler = main.enter(open_sampler, config)
    ...     state = main(sampler.state)
    """

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._untold: Exception | None = None

    def __enter__(self) -> MainRank:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self._stack.__exit__(kind, error, trace)
        finally:
            if self._untold is not None:
                with suppress(RuntimeError):  # they are gone: the error itself is still raised
                    from_main((None, _for_others(self._untold)))

    def __call__(self, work: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
        """`work(*arguments)`, called on the main rank, on every rank.

        Raises:
            UserError, RunStopped: as `work` did.
            Exception: on the main rank whatever else `work` raised; RunStopped with its traceback
                on all others.
        """
        value: T | None = None
        if is_main():
            try:
                value = work(*arguments, **named)
            except Exception as error:
                self._untold = error
                raise
        value, told = from_main((value, None))
        if told is not None:
            raise told
        return cast(T, value)

    def make(self, build: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
        """What `build` gives, on the main rank.  On others a stand-in, whose methods can be named
        in a call of this object, and nothing else."""
        made: list[T] = []
        self(lambda: made.append(build(*arguments, **named)))
        return made[0] if made else cast(T, _Elsewhere())

    def enter(
        self,
        build: Callable[P, AbstractContextManager[T]],
        *arguments: P.args,
        **named: P.kwargs,
    ) -> T:
        """As `make`, of a context that is left when this one is."""
        return self.make(lambda: self._stack.enter_context(build(*arguments, **named)))

    def feed(self, work: Callable[[Iterator[Item]], None], items: Iterator[Item]) -> None:
        """`work(items)` on the main rank, while every rank exhausts its own `items`, as making them
        takes all."""

        def all_of_it() -> None:
            try:
                work(items)
            finally:
                _exhaust(items)

        if not is_main():
            _exhaust(items)
        self(all_of_it)


class _Elsewhere:
    """Stands for an object of the main rank's."""

    def __getattr__(self, name: str) -> Callable[..., NoReturn]:
        def not_here(*_: object, **__: object) -> NoReturn:
            raise AssertionError(f"{name}: the main rank alone has this; call it through MainRank")

        return not_here


def _for_others(error: Exception) -> Exception:
    """What the other ranks raise: none of what only this process may be able to make again."""
    if type(error) in (UserError, RunStopped):
        return type(error)(*error.args)
    return RunStopped(f"{MAIN_RANK_FAILED}:\n{''.join(traceback.format_exception(error))}")


def _exhaust(items: Iterator[object]) -> None:
    for _ in items:
        pass
