"""What the fields of schema.py are made of: types that check their values, and sections."""

from __future__ import annotations

import dataclasses
import difflib
import ipaddress
import math
import re
import typing
from typing import Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    WrapValidator,
)
from pydantic.dataclasses import dataclass
from pydantic_core import CoreSchema, core_schema

T = typing.TypeVar("T")
MOST = 10**9
"""No number is larger: steps, tokens, seconds.  Beyond it clocks and products overflow."""
MOST_SAMPLES = 2**16
"""Of one prompt."""
LEAST = 1e-30
"""Smallest positive number: its inverse is finite in fp32 as well."""

PositiveInt = typing.Annotated[int, Field(ge=1, le=MOST)]
NonNegativeInt = typing.Annotated[int, Field(ge=0, le=MOST)]
SmallInt = typing.Annotated[int, Field(ge=1, le=MOST_SAMPLES)]
Seed = typing.Annotated[int, Field(ge=0, lt=2**63)]
PositiveFloat = typing.Annotated[float, Field(ge=LEAST, le=MOST, allow_inf_nan=False)]
NonNegativeFloat = typing.Annotated[float, Field(ge=0, le=MOST, allow_inf_nan=False)]
Factor = typing.Annotated[float, Field(ge=1, le=1000)]
PositiveShare = typing.Annotated[float, Field(ge=LEAST, lt=1)]
Temperature = typing.Annotated[float, Field(ge=1e-6, le=1e6)]
"""Below, the embedded server takes the likeliest token; above, all tokens are equally likely."""
FiniteFloat = typing.Annotated[float, Field(ge=-MOST, le=MOST, allow_inf_nan=False)]


def _not_zero(value: int) -> int:
    if value == 0:
        raise ValueError("expected -1 (all tokens), or 1 or more")
    return value


TopK = typing.Annotated[int, Field(ge=-1, lt=2**31), AfterValidator(_not_zero)]


_LABEL = "[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_ADDRESS = re.compile(
    rf"(?i:https?)://(\[(?P<ip>[^\[\]/]+)\]|(?=.{{1,253}}(/|:|$)){_LABEL}(\.{_LABEL})*\.?)"
    r"(:(?P<port>[0-9]{1,5}))?(/[A-Za-z0-9._~/-]*)?"
)


def http_url(value: str) -> str:
    """The address, if a request can be sent to it.

    Raises:
        ValueError: it cannot.
    """
    if "@" in value:
        raise ValueError(
            "an address has no user name and no password; name the key's file in "
            "rollout.server.api_key_file"
        )
    found = _ADDRESS.fullmatch(value)
    if found is None or (found["port"] and not 0 < int(found["port"]) < 2**16):
        raise ValueError("expected an address such as http://127.0.0.1:30000")
    if found["ip"]:
        ipaddress.IPv6Address(found["ip"])
    return value.rstrip("/")


Url = typing.Annotated[str, AfterValidator(http_url)]
VariableName = typing.Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
VariableValue = typing.Annotated[  # Linux takes 2**17 bytes, name and all
    str, Field(coerce_numbers_to_str=True, pattern=r"^[^\x00]*$", max_length=2**15)
]


def _not_empty(value: tuple[str, ...]) -> tuple[str, ...]:
    if not value:
        raise ValueError("name at least one")
    return value


def _different(value: tuple[T, ...]) -> tuple[T, ...]:
    twice = [name for name in value if value.count(name) > 1]
    if twice:
        raise ValueError(f"{twice[0]} is named twice")
    return value


_one_or_list = BeforeValidator(lambda value: (value,) if isinstance(value, str | int) else value)
Urls = typing.Annotated[tuple[Url, ...], AfterValidator(_different), _one_or_list]
MOST_STOP_TEXTS = 256
MOST_STOP_LENGTH = 4096
"""Characters of one stop text; every token is held against so many bytes before it."""
_StopText = typing.Annotated[str, Field(max_length=MOST_STOP_LENGTH)]
StopList = typing.Annotated[
    tuple[typing.Annotated[int, Field(ge=0, strict=True)] | _StopText, ...],
    Field(max_length=MOST_STOP_TEXTS),
    _one_or_list,
]
Region = Literal["e1", "e2", "e3", "e4"]
Counts = typing.Annotated[tuple[PositiveInt, ...], AfterValidator(_different), _one_or_list]
Regions = typing.Annotated[
    tuple[Region, ...], AfterValidator(_not_empty), AfterValidator(_different), _one_or_list
]


class Part:
    """Annotates a key that names a part of the run: a built-in one, or the user's own.

    The user's own is `package.module:name` or `path/to/file.py:name` (parts.py imports it); the
    path is made absolute when the configuration is read.
    """

    def __init__(self, *built_in: str):
        self.built_in = built_in

    def __get_pydantic_core_schema__(
        self, source: type[str], handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self.check, handler(source))

    def check(self, name: str) -> str:
        """The name, if it can be one; whether it exists is found out by parts.find."""
        module, colon, attribute = name.rpartition(":")
        if not colon and name.endswith(".py"):
            raise ValueError(f"which part of the file? expected {name}:NAME")
        if name in self.built_in or (
            colon
            and all(map(str.isidentifier, attribute.split(".")))
            and (module.endswith(".py") or all(map(str.isidentifier, module.split("."))))
        ):
            return name
        near = difflib.get_close_matches(name, self.built_in, n=1)
        raise ValueError(
            (f"did you mean {near[0]!r}? " if near else "")
            + f"expected {', '.join(self.built_in)}, or a part of your own as "
            "package.module:name or path/to/file.py:name"
        )


SinkName = typing.Annotated[str, Part("jsonl", "tensorboard", "wandb", "mlflow", "swanlab")]
Sinks = typing.Annotated[tuple[SinkName, ...], AfterValidator(_different), _one_or_list]

LEAST_NATS, MOST_NATS = 1e-4, 20.0
"""Of a target entropy; the second is above ln V of any vocabulary."""
LEAST_PERCENT, MOST_PERCENT = 0.1, 1000.0
"""Of the first step's entropy, likewise."""
_NUMBER = re.compile(r"[+-]?[0-9.]+([eE][+-]?[0-9]+)?")


def _number(value: object) -> float:
    """A number, or one as text; nan if it is none."""
    # float() also takes underscores, and the digits of other scripts
    if isinstance(value, str) and not _NUMBER.fullmatch(value):
        return math.nan
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return math.nan
    try:
        return float(value)
    except (ValueError, OverflowError):
        return math.nan


def _entropy(value: object) -> float | str:
    """A number of nats, or a share of the first step's entropy as text, `80%`."""
    text = value.replace(" ", "") if isinstance(value, str) else ""
    percent = text.endswith("%")
    amount = _number(text.removesuffix("%") or value)
    if not 0 < amount < math.inf:
        raise ValueError(
            "expected an entropy above 0, in nats (0.9) or as a share of the first step's (80%)"
        )
    if percent and not LEAST_PERCENT <= amount <= MOST_PERCENT:
        raise ValueError(
            f"{amount:g}% of the first step's entropy is out of all reach; give {LEAST_PERCENT:g}% "
            f"to {MOST_PERCENT:g}%"
        )
    if percent:
        return text
    if amount < LEAST_NATS:
        raise ValueError(f"{amount:g} nats are no entropy to steer to; give {LEAST_NATS:g} or more")
    if amount > MOST_NATS:
        hint = f"; did you mean {amount:g}%, a share of the first step's entropy?"
        raise ValueError(
            f"no vocabulary has {amount:g} nats" + (hint if amount <= MOST_PERCENT else "")
        )
    return amount


def _entropy_target(value: object) -> float | str | tuple[tuple[float, float | str], ...]:
    if not isinstance(value, list | tuple):
        return _entropy(value)
    points: list[tuple[float, float | str]] = []
    for point in value:
        if not (isinstance(point, list | tuple) and len(point) == 2):
            raise ValueError(
                "expected points [share of the run, entropy], such as [[0, 100%], [1, 70%]], "
                f"not {point!r}"
            )
        share = _number(point[0])
        if not 0 <= share <= 1:
            raise ValueError(f"a share of the run is a number from 0 to 1, not {point[0]!r}")
        if points and share <= points[-1][0]:
            raise ValueError(
                f"shares of the run must rise, but {share:g} follows {points[-1][0]:g}"
            )
        try:
            points.append((share, _entropy(point[1])))
        except ValueError as error:
            raise ValueError(f"point {point}: {error}") from None
    if not points:
        raise ValueError("name at least one point [share of the run, entropy]")
    return tuple(points)


EntropyTarget = typing.Annotated[
    float | str | tuple[tuple[float, float | str], ...],
    WrapValidator(lambda value, _: _entropy_target(value)),
]

Arguments = dict[str, typing.Any]
"""Passed to a part by keyword."""


@typing.dataclass_transform(
    kw_only_default=True, frozen_default=True, field_specifiers=(dataclasses.field,)
)
def section(cls: type[T]) -> type[T]:
    """A frozen, validated dataclass that refuses unknown keys; docstrings document its fields."""
    settings = ConfigDict(extra="forbid", use_attribute_docstrings=True)
    made = dataclass(frozen=True, kw_only=True, config=settings)(cls)
    return typing.cast(type[T], made)
