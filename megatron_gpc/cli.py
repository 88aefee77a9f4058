"""The command line: `megatron-gpc COMMAND ...`; each command is a file of commands/."""

from __future__ import annotations

import argparse
import difflib
import errno
import importlib
import io
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from megatron_gpc import __version__
from megatron_gpc.errors import RunStopped, UserError
from megatron_gpc.run.say import say
from megatron_gpc.run.stop import INTERRUPTED

COMMANDS = {
    "init": "write a run to start from",
    "train": "run a training",
    "status": "how a run is doing",
    "serve": "start rollout engines for a run elsewhere",
    "eval": "evaluate a checkpoint on held-out prompts",
    "doctor": "look whether this node or allocation can train",
    "plot": "draw runs again",
    "samples": "look at what was sampled",
    "convert hf-to-megatron": "a Hugging Face checkpoint to a distributed one",
    "convert megatron-to-hf": "a distributed checkpoint to Hugging Face's format",
    "convert prompts": "a published prompt set to JSON lines",
    "parity": "compare a distributed checkpoint with transformers",
    "estimate-memory": "how much GPU memory a configuration takes",
    "rank": "",  # what `train` starts its processes with
}
"""Command -> what it does.  `convert prompts` is commands/convert_prompts.py."""


LONGEST_LINE = 1500
"""Characters of an error; it repeats what the user has given, which may be a book."""
_OF_A_PATH = (
    *(errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENOTDIR, errno.EISDIR),
)
"""What is wrong with a path that was given, and not with the program or the disk."""


class Parser(argparse.ArgumentParser):
    """Says what is wrong with its arguments in one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns what `exit_code` does."""
    return exit_code(lambda: _run(sys.argv[1:] if argv is None else list(argv)))


def exit_code(work: Callable[[], int]) -> int:
    """Do a command's work, or a script's.

    Returns:
        0; 1 if a run ended itself, 2 if the user's input cannot be used (both said in one line, no
        traceback); 75 if a run was asked to end and saved; 130 if Ctrl-C ended it; otherwise the
        exit code of the part that failed.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be text
    try:
        return work()
    except UserError as error:
        print(f"megatron-gpc: {_one_line(str(error))}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in _OF_A_PATH or error.filename is None:
            raise
        print(_one_line(f"megatron-gpc: {error.filename}: {error.strerror}"), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        say("interrupted")
        return INTERRUPTED
    except RunStopped as stopped:
        say(str(stopped))  # every rank stops, with the same words
        return 1


def _one_line(text: str) -> str:
    """The text without anything that a terminal would obey, and the middle if it is too long."""
    text = " ".join(text.split())
    if len(text) > LONGEST_LINE:
        text = f"{text[: LONGEST_LINE - 300]} ... {text[-200:]}"
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def _run(words: list[str]) -> int:
    for word in words:
        if "\0" in word:  # a program's, never a shell's
            raise UserError(f"{word!r} cannot be a path: it has a NUL in it")
    name = next((name for name in COMMANDS if words[: len(name.split())] == name.split()), None)
    if name is None:
        return _without_command(words)
    file = name.replace(" ", "_").replace("-", "_")
    command = importlib.import_module(f"megatron_gpc.commands.{file}")  # of no other: torch is slow
    parser = Parser(
        prog=f"megatron-gpc {name}",
        description=command.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_arguments(parser)
    return command.run(parser.parse_intermixed_args(words[len(name.split()) :]))


def _without_command(words: list[str]) -> int:
    group = [name for name in COMMANDS if words and name.split()[0] == words[0]]  # of `convert`
    if words == ["--version"]:
        print(__version__)
    elif {"-h", "--help"} & {*words[:1], *(words if group else ())}:
        print("usage: megatron-gpc COMMAND ...\n")
        for name in group or COMMANDS:
            if COMMANDS[name]:
                print(f"  {name:<24}{COMMANDS[name]}")
        print("\n`megatron-gpc COMMAND --help` says more.")
    elif not words:
        raise UserError("name a command; megatron-gpc --help lists them")
    elif group:
        what = f"there is no command {' '.join(words[:2])!r}" if words[1:] else f"{words[0]} what?"
        raise UserError(f"{what}; there are {', '.join(group)}")
    else:
        near = difflib.get_close_matches(words[0], filter(COMMANDS.get, COMMANDS), n=1)
        hint = f"did you mean {near[0]!r}?" if near else "megatron-gpc --help lists them"
        raise UserError(f"there is no command {words[0]!r}; {hint}")
    return 0
