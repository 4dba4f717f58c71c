"""The one exception for everything that the user can mend."""

from __future__ import annotations

import re

SECRET = re.compile(  # NAME=VALUE as addresses and connection strings carry them
    r"\b(sig|signature|x-amz-[a-z-]+|awsaccesskeyid|(?:access_|auth)?token"
    r"|(?:shared|account|access|secret|api)[a-z_-]*(?:key|signature))=[^&\s;'\"]+",
    re.IGNORECASE,
)


def hide_secrets(text: str) -> str:
    """The text without the values of what looks like credentials."""
    return SECRET.sub(r"\1=…", text)


class UserError(Exception):
    """Something outside the program is wrong: a config, a file, a model, a disk.

    The message says what was found, what is allowed and what to do; the command line prints it
    without a traceback and exits with status 2. What looks like credentials is left out of it.
    """

    def __init__(self, message: object):
        super().__init__(hide_secrets(str(message)))
