"""The exceptions that users see: the first two without a traceback, the third with one."""

import re

CREDENTIALS = re.compile(r"://[^\s'\"]*@")
"""A user's name and password in an address."""


class UserError(ValueError):
    """Input that a user can mend: a wrong key, a missing file, a contradictory layout.

    The message names the field, file or tensor and the way out.  The command line prints it alone
    and exits with code 2; from Python it is an ordinary ValueError.
    A user's name and password in an address are not shown.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(CREDENTIALS.sub("://...@", str(message)))


class RunStopped(RuntimeError):
    """A run that ends itself for a reason that needs no traceback, on every rank at once.

    The command line prints the message and exits with code 1.
    """


class PartError(RuntimeError):
    """A part that the user brought (reward, loss, schedule, sink) failed while the run went on.

    The message names the part; the cause is its own exception, so the traceback shows both.
    """
