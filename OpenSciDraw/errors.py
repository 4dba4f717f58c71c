"""The one exception for everything that the user can mend."""


class UserError(Exception):
    """Something outside the program is wrong: a config, a file, a model, a disk.

    The message says what was found, what is allowed and what to do; the command line prints it
    without a traceback and exits with status 2.
    """
