"""The one exception for everything that the user can mend."""

from __future__ import annotations

import errno
import re
import sys
from collections.abc import Callable

SECRET = re.compile(  # NAME=VALUE as addresses and connection strings carry them
    r"\b(sig|signature|x-amz-[a-z-]+|awsaccesskeyid|(?:access_|auth)?token"
    r"|(?:shared|account|access|secret|api)[a-z_-]*(?:key|signature))=[^&\s;'\"]+",
    re.IGNORECASE,
)

FULL = (errno.ENOSPC, errno.EDQUOT)
_REFUSED = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.EIO, errno.EFBIG,
)  # fmt: skip


def hide_secrets(text: str) -> str:
    """The text without the values of what looks like credentials."""
    return SECRET.sub(r"\1=…", text)


def run_command(command: Callable[[], int]) -> int:
    """The exit code of a command; 2, after a line that says what, where there is something for the user to mend."""
    try:
        return command()
    except UserError as error:
        said = str(error)
    except OSError as error:
        refusal = _refusal(error)
        if refusal is None:
            raise
        said = refusal
    print(f"error: {said}", file=sys.stderr)
    return 2


def _refusal(error: OSError) -> str | None:
    """What to tell of a file that the system refuses; None where the error is none of its rights, names and disks."""
    if error.errno in FULL:
        return f"the disk is full ({error}). What was finished is kept: free space and run it again."
    if error.errno in _REFUSED and error.filename is not None:
        return f"{error.filename}: {error.strerror}. Check the path and its rights, or choose another one."
    return None


class UserError(Exception):
    """Something outside the program is wrong: a config, a file, a model, a disk.

    The message says what was found, what is allowed and what to do; the command line prints it
    without a traceback and exits with status 2. What looks like credentials is left out of it.
    """

    def __init__(self, message: object):
        super().__init__(hide_secrets(str(message)))
