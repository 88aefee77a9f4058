"""The key that engines ask for: read, made, and kept where nobody else can read it.

No error shows what is in a key file.
"""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path

from megatron_gpc.errors import UserError
from megatron_gpc.run.files import write_output

MOST_BYTES = 4096
WAY_OUT = "make one with: (umask 077 && head -c 24 /dev/urandom | base64 >FILE)"


def read_key(file: Path, name: str = "rollout.server.api_key_file") -> str:
    """The key, one line of visible ASCII.

    Args:
        name: what the user calls the file, for errors.

    Raises:
        UserError: the file is absent, no plain file, readable by others, empty, or has anything but
            one such line.
    """
    try:
        # not blocking, or a FIFO would be waited for
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{name}: {file}: cannot be read: {reason}; {WAY_OUT}") from None
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise UserError(f"{name}: {file}: cannot be read: it is no plain file; {WAY_OUT}")
        if found.st_mode & 0o077:
            raise UserError(
                f"{name}: {file} has mode {stat.S_IMODE(found.st_mode):04o}: others can read or "
                "change it; chmod 600 it, and take another key if others may know this one"
            )
        content = os.read(descriptor, MOST_BYTES + 1)
    finally:
        os.close(descriptor)
    key = content.strip(b" \t\r\n")
    if not key:
        raise UserError(f"{name}: {file} is empty; {WAY_OUT}")
    if len(content) > MOST_BYTES or not all(0x21 <= byte <= 0x7E for byte in key):
        raise UserError(
            f"{name}: {file} must have one line of visible ASCII characters, at most "
            f"{MOST_BYTES} bytes; {WAY_OUT}"
        )
    return key.decode("ascii")


def new_key(file: Path) -> Path:
    """A file with a random key; what had the name before is gone."""
    return write_secret(file, secrets.token_urlsafe(32) + "\n")


def key_beside(urls_file: Path) -> Path:
    """Where `serve` puts the key of its engines, and runs look for it."""
    return urls_file.with_name(f"{urls_file.name}.key")


def shared_key(file: Path) -> Path:
    """A file with a random key; it stays if it is there, and of several at a time one makes it.

    Raises:
        UserError: it cannot be written, or what is there is no key.
    """
    made = new_key(file.with_name(f".{file.name}.{secrets.token_hex(4)}"))
    try:
        os.link(made, file)
    except FileExistsError:
        read_key(file, "the engines' key")
    except OSError as error:
        raise UserError(f"{file}: cannot be written: {error.strerror}") from None
    finally:
        made.unlink()
    return file


def write_secret(file: Path, text: str) -> Path:
    """A new file that only the user can read; no link is followed, no old mode is kept.

    Raises:
        UserError: it cannot be written.
    """
    return write_output(file, text, 0o600)
