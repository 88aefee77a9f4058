"""The two exceptions that users see without a traceback."""


class UserError(ValueError):
    """Input that a user can mend: a wrong key, a missing file, a contradictory layout.

    The message names the field, file or tensor and the way out.  The command line prints it alone
    and exits with code 2; from Python it is an ordinary ValueError.
    """


class RunStopped(RuntimeError):
    """A run that ends itself for a reason that needs no traceback, on every rank at once.

    The command line prints the message and exits with code 1.
    """
