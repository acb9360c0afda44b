"""The one exception a user is meant to read."""


class UserError(Exception):
    """Something outside the code is wrong: a config field, a file, an address, a server.

    The message names the field, file or rank and says what would be right. The entry points print it as one line
    without a traceback and exit with a non-zero status.
    """
