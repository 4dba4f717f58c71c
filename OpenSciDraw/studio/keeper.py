"""`python -m OpenSciDraw.studio.keeper JOB`: runs a job's command in a session of its own and writes down how it ended."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from OpenSciDraw.utils.files import parse_json, write_json
from OpenSciDraw.utils.sole_user import born, kernel


def main(place: Path) -> int:
    """The exit code of the command; 3 where another keeper has the job."""
    lock = os.open(place / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return 3
    if (place / "started.json").exists() or (place / "stop").exists():
        return 3
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)  # a handler, not SIG_IGN, which the command would inherit
    job = parse_json((place / "job.json").read_bytes())
    command = [sys.executable, "-m", "OpenSciDraw.cli", job["command"], *job["arguments"]]
    with (place / "log.txt").open("ab") as log:
        log.write(f"$ scienceflow {' '.join([job['command'], *job['arguments']])}\n".encode())
        log.flush()
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    me = os.getpid()
    write_json(place / "started.json", {
        "process": process.pid, "process_born": born(process.pid), "keeper": me, "keeper_born": born(me), "kernel": kernel(),
        "time": time.time(),
    })  # fmt: skip
    if (place / "stop").exists():  # asked for while it began
        os.killpg(process.pid, signal.SIGTERM)
    code = process.wait()
    write_json(place / "ended.json", {"code": code, "time": time.time()})
    return code


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
