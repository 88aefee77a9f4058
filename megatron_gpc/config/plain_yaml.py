"""YAML of what JSON can hold, without what surprises: a key given twice, `1:30` read as 90, `017`
read as 15, `1e-5` read as text, dates, tags, aliases of aliases.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from megatron_gpc.errors import UserError
from megatron_gpc.run.files import MOST_JSON_BYTES, check_regular

MOST_VALUES = 10**5
"""Of a document, aliases written out."""
MOST_DEPTH = 50
MOST_BITS = 1024
"""Of a whole number; more than any key takes, and no message may become longer."""

_YAML = "tag:yaml.org,2002:"
_KINDS = {_YAML + kind for kind in ("null", "bool", "int", "float", "str", "seq", "map")}
_NUMBERS = {
    "int": r"[-+]?(0|[1-9][0-9]*)|0x[0-9a-fA-F]+",
    "float": r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
    r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
}
"""How numbers are written."""


class _Loader(yaml.SafeLoader):
    yaml_constructors = {  # noqa: RUF012 - yaml's way
        kind: make
        for kind, make in yaml.SafeLoader.yaml_constructors.items()
        if kind is None or kind in _KINDS
    }
    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(kind, form) for kind, form in forms if kind.endswith(("null", "bool", "merge"))]
        for first, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if key.tag not in (_YAML + "str", _YAML + "merge"):
                what = f"{key.value!r:.80} is no text, as keys are; put it in quotes"
                raise yaml.constructor.ConstructorError(None, None, what, key.start_mark)
            if key.value in seen:
                what = f"{key.value!r:.80} is given twice"
                raise yaml.constructor.ConstructorError(None, None, what, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Puts text in quotes that `_Loader`, or another reader, would take for something else."""


for _kind, _form in _NUMBERS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(
            _YAML + _kind, re.compile(f"^(?:{_form})$", re.ASCII), list("-+.0123456789")
        )


def parse(text: str) -> Any:
    """What a document holds.

    Raises:
        ValueError: no YAML, or something that JSON cannot hold, or far more than there is text.
    """
    try:
        content = yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(str(error)) from None
    except (ArithmeticError, LookupError, AttributeError, TypeError) as error:  # `!!bool x`
        raise ValueError(f"a tag does not fit its value: {error}") from None
    left, size = [(content, 0)], 0
    while left:  # of aliases of aliases a few lines become billions, or have no end
        value, depth = left.pop()
        inner = [*value, *value.values()] if isinstance(value, dict) else value
        left += [(one, depth + 1) for one in inner] if isinstance(inner, list) else ()
        size += 1
        if "*" in text and (depth > MOST_DEPTH or size + len(left) > MOST_VALUES):
            raise ValueError(f"its aliases stand for more than {MOST_VALUES} values")
        if depth > MOST_DEPTH:
            raise ValueError(f"nested deeper than {MOST_DEPTH}")
        if isinstance(value, int) and value.bit_length() > MOST_BITS:
            raise ValueError("a number has more than 300 digits")
    return content


def read_mapping(file: Path) -> dict[str, Any]:
    """The mapping that a file holds.

    Raises:
        UserError: it is no regular file, too large, no text, no YAML (see `parse`), no mapping.
    """
    try:
        if not file.is_dir():
            check_regular(file)  # a pipe would be waited for
        if file.stat().st_size > MOST_JSON_BYTES:
            raise UserError(f"{file}: too large for YAML; put the right file there")
        text = file.read_bytes().decode()
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: is no text file, and no YAML: {error}") from None
    except ValueError as error:  # a NUL
        raise UserError(f"{str(file)!r} cannot be a path: {error}") from None
    try:
        content = parse(text)
    except ValueError as error:
        raise UserError(f"{file}: not valid YAML: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{file}: expected a mapping of keys, found {type(content).__name__}")
    return content


def dump_plain(content: Any) -> str:
    """As YAML that `parse` reads back to the same."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, width=100)
