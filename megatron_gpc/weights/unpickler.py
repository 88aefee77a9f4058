"""Reads pickles of strangers: with the classes that are allowed alone, and without their tricks."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from typing import Any

_Python: Any = pickle._Unpickler
"""Python's own: it has a method for every opcode.  The one in C takes memory as it is told to."""
_OPCODES = (
    *(pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK, pickle.POP, pickle.POP_MARK),
    *(pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.BININT, pickle.BININT1, pickle.BININT2),
    *(pickle.LONG1, pickle.BINFLOAT, pickle.BINBYTES, pickle.BINBYTES8, pickle.SHORT_BINBYTES),
    *(pickle.BINUNICODE, pickle.BINUNICODE8, pickle.SHORT_BINUNICODE, pickle.EMPTY_TUPLE),
    *(pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3, pickle.EMPTY_LIST, pickle.APPEND),
    *(pickle.APPENDS, pickle.EMPTY_DICT, pickle.SETITEM, pickle.SETITEMS, pickle.EMPTY_SET),
    *(pickle.ADDITEMS, pickle.FROZENSET, pickle.BINGET, pickle.LONG_BINGET, pickle.BINPUT),
    *(pickle.LONG_BINPUT, pickle.MEMOIZE, pickle.GLOBAL, pickle.STACK_GLOBAL, pickle.REDUCE),
    *(pickle.NEWOBJ, pickle.BUILD),
)
"""What pickle writes since protocol 2 for data and instances of classes."""


class _Dispatch(dict[int, Any]):
    def __missing__(self, code: int) -> Any:
        raise pickle.UnpicklingError(f"opcode {bytes([code])!r} is not allowed in it")


class RestrictedUnpickler(_Python):
    """Hands out what is in `allowed` (module -> names), and changes instances of these alone."""

    allowed: Mapping[str, set[str]] = {}
    dispatch = _Dispatch((code[0], _Python.dispatch[code[0]]) for code in _OPCODES)

    def find_class(self, module: str, name: str) -> Any:
        if name not in self.allowed.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed in it")
        return super().find_class(module, name)

    def load_build(self) -> None:
        """Set attributes, of instances alone: those of a class or function would stay for good."""
        kind = type(self.stack[-2])
        if kind.__name__ not in self.allowed.get(kind.__module__, ()):
            raise pickle.UnpicklingError(f"it would change {kind.__module__}.{kind.__name__}")
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build

    def load_long_binput(self) -> None:
        """torch reads `.metadata` again, in C, where a place far away costs that much memory."""
        place = int.from_bytes(self.read(4), "little")
        if place > len(self.memo):
            raise pickle.UnpicklingError(f"its memo has no place {place}")
        self.memo[place] = self.stack[-1]

    dispatch[pickle.LONG_BINPUT[0]] = load_long_binput
