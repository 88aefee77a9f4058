"""From a YAML file and `key=value` overrides to a Config, and back.

Imports no torch, so that a wrong key is reported in a fraction of a second.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import os
import re
import typing
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from megatron_gpc.config import Config
from megatron_gpc.config.plain_yaml import MOST_DEPTH, dump_plain, parse, read_mapping
from megatron_gpc.config.types import Part
from megatron_gpc.errors import CREDENTIALS, UserError

MOST_NAME_BYTES, MOST_PATH_BYTES = 255, 4000
"""Of a file or folder, on Linux; a path has room for the names of what lies in the folder."""


@functools.cache
def keys(section: Any = Config, prefix: str = "") -> dict[str, Any]:
    """Dotted name -> type of every key that can be set, sections left out."""
    found = {}
    for name, kind in typing.get_type_hints(section, include_extras=True).items():
        if dataclasses.is_dataclass(kind):
            found.update(keys(kind, f"{prefix}{name}."))
        else:
            found[prefix + name] = kind
    return found


def load(path: Path, overrides: typing.Sequence[str] = ()) -> Config:
    """Read a YAML file, apply `key=value` overrides, check everything.

    A file may say `extends: FILE`: it has that file's keys unless it sets them itself.
    Relative paths in a file are relative to it, those in overrides to the current folder.

    Raises:
        UserError: unreadable file, unknown key (names the nearest valid one), wrong type or value.
    """
    flat, origin = _read(Path(path))
    for override in overrides:
        key, found, text = override.partition("=")
        said = f"override {key if '@' in text else override!r:.200}"  # it may have a password
        if not found:
            raise UserError(f"{said}: expected key=value")
        try:
            nested: Any = parse(text)
        except ValueError:  # brackets that are not closed
            nested = text
        for part in reversed(key.split(".", MOST_DEPTH)):
            nested = {part: nested}
        given = _flatten(nested, said)
        if not given:
            raise UserError(f"{said}: {key} is a section; set its keys")
        flat = _over(flat, _resolve_paths(given, Path.cwd()))
        origin.update(dict.fromkeys(given, said))
    return _build(flat, str(path), origin)


def _read(path: Path, extended_by: tuple[Path, ...] = ()) -> tuple[dict[str, Any], dict[str, str]]:
    """Dotted key -> value of a file, over those of the file that it extends; and key -> file."""
    content = read_mapping(path)
    name, path, base = str(path), path.resolve(), content.pop("extends", None)
    if base is not None and not isinstance(base, str):
        raise UserError(f"{path}: extends: expected the name of a file, got {base!r}")
    if path in extended_by:
        raise UserError(f"{path}: extends itself: {' -> '.join(map(str, (*extended_by, path)))}")
    below, origin = {}, {}
    if base is not None:
        below, origin = _read(path.parent / base, (*extended_by, path))
    own = _resolve_paths(_flatten(content, name), path.parent)
    return _over(below, own), origin | dict.fromkeys(own, name)


def warnings(config: Config) -> list[str]:
    """What is allowed but hardly meant, a sentence each."""
    found = []
    train = config.train
    if train.mini_batches * train.epochs == 1 and train.old_logprobs == "trainer":
        found.append(
            "clipping is inert: with one update a rollout (train.mini_batches * epochs = 1) and "
            "train.old_logprobs=trainer every ratio is 1, so no threshold can act and "
            f"clip.schedule={config.clip.schedule} changes nothing; raise train.mini_batches or "
            "train.epochs, or set train.old_logprobs=rollout"
        )
    if config.clip.target is not None and config.clip.schedule != "target":
        found.append(
            f"clip.target is not used, because clip.schedule is {config.clip.schedule}; set "
            "clip.schedule=target"
        )
    if config.kl.reference and config.kl.coef == 0:
        found.append("kl.reference is not used, because kl.coef is 0; set kl.coef above 0")
    if train.loss == "gspo" and config.clip.schedule != "static":
        found.append(
            f"clip.schedule={config.clip.schedule} changes nothing: train.loss=gspo has thresholds "
            "of its own, train.loss_arguments.eps_low and eps_high; set clip.schedule=static to "
            "say so"
        )
    return found


def dump(config: Config) -> str:
    """The resolved configuration as YAML; `load` gives the same configuration back."""
    return dump_plain(plain(config))


def plain(config: Config) -> dict[str, Any]:
    """The resolved configuration as mappings of what YAML and JSON have."""
    return TypeAdapter(Config).dump_python(config, mode="json")


def flatten(content: typing.Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mapping -> dotted keys, unchecked: {"clip": {"schedule": "id"}} -> clip.schedule."""
    flat = {}
    for name, value in content.items():
        flat |= (
            flatten(value, f"{prefix}{name}.")
            if isinstance(value, dict)
            else {f"{prefix}{name}": value}
        )
    return flat


def _flatten(content: dict[str, Any], source: str, prefix: str = "") -> dict[str, Any]:
    """Nested mapping -> dotted keys, every one checked to exist."""
    valid = keys()
    sections = {
        name.rsplit(".", depth)[0] for name in valid for depth in range(1, name.count(".") + 1)
    }
    flat: dict[str, Any] = {}
    for name, value in content.items():
        key = f"{prefix}{name}"
        if key in sections:
            if value is None:  # `clip:` with nothing below it
                continue
            if not isinstance(value, dict):
                raise UserError(
                    f"{source}: {key} is a section; set its keys, such as "
                    f"{next(k for k in valid if k.startswith(key + '.'))}"
                )
            found = _flatten(value, source, key + ".")
        elif key not in valid:
            raise UserError(f"{source}: unknown key {key!r}{_nearest(key, [*valid, *sections])}")
        elif typing.get_origin(valid[key]) is dict and isinstance(value, dict) and value:
            found = {f"{key}.{field}": inner for field, inner in value.items()}
        else:
            found = {key: value}
        if twice := sorted({*flat} & {*found}):  # `train.steps: 1` beside `train: {steps: 2}`
            raise UserError(f"{source}: {twice[0]!r} is given twice")
        flat |= found
    return flat


def _over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Both, the second over the first; fields of a mapping add up, but `{}` empties it."""
    emptied = tuple(f"{key}." for key, value in above.items() if value == {})
    return {key: value for key, value in below.items() if not key.startswith(emptied)} | above


def _nearest(key: str, valid: typing.Iterable[str]) -> str:
    names = list(valid)
    match = difflib.get_close_matches(key, names, n=1, cutoff=0.6)
    if not match:  # right name, wrong section
        last = key.rsplit(".", 1)[-1]
        match = [name for name in names if name.rsplit(".", 1)[-1] == last][:1]
    return f"; did you mean {match[0]!r}?" if match else "; all keys are in config/schema.py"


def _resolve_paths(flat: dict[str, Any], base: Path) -> dict[str, Any]:
    """Absolute, and still a link if it is one: an environment's interpreter is, to another's."""
    valid = keys()
    is_path = {key for key, kind in valid.items() if kind is Path or Path in typing.get_args(kind)}
    is_part = {key for key, kind in valid.items() if _names_parts(kind)}

    def resolve(key: str, value: str) -> str:
        try:
            os.fsencode(value)
            if "\0" in value:
                raise ValueError("it has a NUL in it")
            path = base / Path(value).expanduser()
            name = path.name if path.name != ".." else ""
            found = (path.parent if name else path).resolve() / name
            names = [len(os.fsencode(part)) for part in found.parts]
            if max(names) > MOST_NAME_BYTES or sum(names) + len(names) > MOST_PATH_BYTES:
                raise ValueError("it is too long")
            return str(found)
        except (OSError, RuntimeError, ValueError) as error:  # ~nobody; half of a surrogate pair
            why = getattr(error, "strerror", None) or error
            raise UserError(f"{key}: {value!r:.100} cannot be a path: {why}") from None

    def resolve_part(key: str, value: Any) -> Any:
        if isinstance(value, list):
            return [resolve_part(key, item) for item in value]
        file, colon, name = str(value).rpartition(":")
        is_file = isinstance(value, str) and file.endswith(".py")
        return resolve(key, file) + colon + name if is_file else value

    resolved = dict(flat)
    for key, value in flat.items():
        if key in is_path and isinstance(value, str):
            resolved[key] = resolve(key, value)
        elif key in is_part:
            resolved[key] = resolve_part(key, value)
    return resolved


def _names_parts(kind: Any) -> bool:
    """Whether values of this type are names of parts, or lists of them."""
    return isinstance(kind, Part) or any(map(_names_parts, typing.get_args(kind)))


def _scalars(value: Any) -> list[Any]:
    """All that is in a list or a mapping but is none itself."""
    if isinstance(value, dict):
        value = [*value.values()]
    if not isinstance(value, list):
        return [value]
    return [one for inner in value for one in _scalars(inner)]


def _build(flat: dict[str, Any], file: str, origin: dict[str, str]) -> Config:
    """`origin` says what to blame for the keys that are not the file's."""
    # Without a required section pydantic would name the section, not the key.
    nested: dict[str, Any] = {"model": {}, "data": {}}
    for key, value in flat.items():
        *parents, name = key.split(".")
        here = nested
        for parent in parents:
            here = here.setdefault(parent, {})
            if not isinstance(here, dict):  # a name with a dot in it, beside a shorter one
                raise UserError(
                    f"{origin.get(key, file)}: {key}: {parent!r} holds {here!r:.60} also"
                )
        here[name] = value
        if CREDENTIALS.search(str(value)):
            raise UserError(
                f"{origin.get(key, file)}: {key}: config.yaml would keep the password in that "
                "address; give it through the environment, or for engines by "
                "rollout.server.api_key_file"
            )
    kinds = keys()
    for key, value in flat.items():
        for one in _scalars(value):
            if isinstance(one, bool) and kinds.get(key, bool) is not bool:  # for pydantic it is 1
                raise UserError(f"{origin.get(key, file)}: {key}: is no switch, got {one}")
            if isinstance(one, float) and not math.isfinite(one) and key not in kinds:
                raise UserError(f"{origin.get(key, file)}: {key}: {one} is no finite number")
    arguments = nested.get("sglang", {}).get("args")
    for name in arguments if isinstance(arguments, dict) else ():
        if str(name).replace("-", "_") in ("api_key", "admin_api_key"):
            raise UserError(
                f"{file}: sglang.args.{name}: a command line shows it to every user of the node; "
                "name a file with the key in rollout.server.api_key_file"
            )
    try:
        return TypeAdapter(Config).validate_python(nested)
    except UnicodeError:
        key = next(key for key in flat if re.search(r"\\ud[89a-f]", ascii((key, flat[key]))))
        what = f"{key!a:.80} has half of a character in its name or value"
        raise UserError(f"{origin.get(key, file)}: {what}; write it out") from None
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            key = ".".join(str(part) for part in problem["loc"])
            what = problem["msg"].replace("Input", "input").removeprefix("Value error, ")
            if "@" not in str(problem["input"]):  # there may be a password before it
                what += f", got {problem['input']!r:.300}"
            if problem["type"] == "missing":
                what = "is required"
            blamed = next((origin[k] for k in origin if f"{key}.".startswith(f"{k}.")), file)
            lines.append(f"{blamed}: {key}: {what}")
        raise UserError("; ".join(lines)) from None
