"""What ends a script with one line and an exit code of its own."""


class UserError(ValueError):
    """A flag, file or argument that cannot work.

    The message is one line that names the value, what is wrong with it and what to do. Library
    code sees an ordinary :class:`ValueError`; the scripts print the line and exit with code 2.
    """


class Stop(Exception):
    """Training has ended, on all processes together, and not because it was done.

    Everything is saved. The scripts print the message and exit with ``exit_code``.
    """

    exit_code = 1


class RunAgain(Stop):
    """Training was asked to stop; the same command continues it."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: try again


class Diverged(Stop):
    """Losses or gradients stay non-finite."""

    exit_code = 3
