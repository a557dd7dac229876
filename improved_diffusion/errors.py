"""The one exception that stands for a user's mistake."""


class UserError(ValueError):
    """A flag, file or argument that cannot work.

    The message is one line that names the value, what is wrong with it and what to do. Library
    code sees an ordinary :class:`ValueError`; the scripts print the line and exit with code 2.
    """
