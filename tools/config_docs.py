"""Every key of the configuration as a page, from the docstrings of config/schema.py: `make docs`.

python tools/config_docs.py > docs/config.md
"""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic.fields import FieldInfo

from megatron_gpc.config import Config
from megatron_gpc.config.types import EntropyTarget, Part

HEAD = """# Configuration

Every key, from the docstrings of `megatron_gpc/config/schema.py`. Made by `make docs`; do not edit.

A configuration is one YAML file plus overrides (`key=value` on the command line). `extends: FILE`
takes over another file's keys. Relative paths in a file are relative to it, those in overrides to
the current folder. A key without a default must be given.
"""


def page() -> str:
    """docs/config.md."""
    return "\n".join([HEAD, *sections(Config, "")]) + "\n"


def sections(section: Any, prefix: str) -> Iterator[str]:
    """The keys of a section, then its sections, each under a heading of its own."""
    fields: dict[str, FieldInfo] = section.__pydantic_fields__
    kinds = typing.get_type_hints(section, include_extras=True)
    yield f"## {'The run' if not prefix else f'`{prefix[:-1]}`'}\n"
    yield section.__doc__.split("\n", 1)[0] + paragraphs(section.__doc__) + "\n"
    for name, field in fields.items():
        if not dataclasses.is_dataclass(kinds[name]):
            default = "required" if field.is_required() else f"default `{shown(field)}`"
            text = " ".join((field.description or "").split())
            yield f"- **`{prefix}{name}`** ({kind(kinds[name])}; {default})  \n  {text}"
    yield ""
    for name, inner in kinds.items():
        if dataclasses.is_dataclass(inner):
            yield from sections(inner, f"{prefix}{name}.")


def paragraphs(doc: str) -> str:
    """What follows a docstring's first line."""
    rest = doc.partition("\n")[2]
    return "\n" + re.sub(r"(?m)^ +", "", rest).rstrip() if rest.strip() else ""


def shown(field: FieldInfo) -> str:
    """A default as YAML would say it."""
    value = field.get_default(call_default_factory=True)
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, tuple):
        return f"[{', '.join(map(str, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def kind(annotation: Any) -> str:
    """A type in a user's words: `a | b`, `number > 0`, `list of ...`."""
    if annotation is EntropyTarget:
        return "nats, a share such as `80%`, or a list of points"
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        parts = [extra for extra in arguments[1:] if isinstance(extra, Part)]
        if parts:
            own = "package.module:name", "path/to/file.py:name"
            return " \\| ".join(f"`{name}`" for name in (*parts[0].built_in, *own))
        limits = [limit for extra in arguments[1:] for limit in bounds(extra)]
        return " ".join([kind(arguments[0]), " and ".join(limits)]).strip()
    if origin is Literal:
        return " \\| ".join(f"`{value}`" for value in arguments)
    if origin is tuple:
        return f"one or a list of: {kind(arguments[0])}"
    if origin is dict:
        return "mapping"
    if origin in (typing.Union, types.UnionType):
        either = " or ".join(kind(one) for one in arguments if one is not type(None))
        return f"{either}, or null" if type(None) in arguments else either
    names = {int: "whole number", float: "number", bool: "true or false", str: "text", Path: "path"}
    return names[annotation]


def bounds(extra: Any) -> Iterator[str]:
    """`> 0` and such of pydantic's Field."""
    signs = {"Gt": ("gt", ">"), "Ge": ("ge", ">="), "Lt": ("lt", "<"), "Le": ("le", "<=")}
    for limit in getattr(extra, "metadata", ()):
        if type(limit).__name__ in signs:
            name, sign = signs[type(limit).__name__]
            yield f"{sign} {getattr(limit, name):g}"


if __name__ == "__main__":
    print(page(), end="")
