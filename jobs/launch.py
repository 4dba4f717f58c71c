"""`accelerate launch` on one machine of a job, for every cluster; all arguments are accelerate's own.

    python jobs/launch.py --config_file accelerate_cfg/1m8g_bf16.yaml train_OpenSciDraw_loop.py CONFIG.py

It adds what accelerate does not do:

- Several machines: this one's rank and the first one's address come from the cluster's environment.
- A stop that keeps the work. torchrun, which accelerate uses, passes SIGTERM on and kills after 30 seconds, in which a large
  checkpoint is not written. Here SIGTERM, SIGINT and SIGUSR1 go to the training processes alone, which finish their step, save
  and leave; a second signal stops them at once. SCIENCEFLOW_PID_FILE names a file for this process's id.
- The exit code of the process that failed first (accelerate gives 1 for all), and 75 after such a signal: run it again.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

RUN_AGAIN = 75  # as the training program itself says it
RANK_NAMES = ("SLURM_NODEID", "SKYPILOT_NODE_RANK", "NODE_RANK")  # of this machine: Slurm, SkyPilot, Azure ML and amlt
NODES_NAMES = ("SLURM_JOB_NUM_NODES", "SKYPILOT_NUM_NODES", "AZUREML_NODE_COUNT")
WORKER_NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK")  # of a cluster's own launcher
IN_PLACE = "--in-place"


def machines(config_file: str | None) -> int:
    """num_machines of an accelerate file."""
    if config_file is None:
        return 1
    import yaml  # accelerate needs it as well

    return int(yaml.safe_load(Path(config_file).read_text()).get("num_machines", 1))


def arguments_of_place(environment: Mapping[str, str], wanted: int) -> list[str]:
    """accelerate's arguments for this machine's place among `wanted` machines.

    Raises:
        ValueError: the cluster gave another number of machines; rank or address are not in the environment.
    """
    given = next((int(environment[name]) for name in NODES_NAMES if environment.get(name)), None)
    if given is not None and given != wanted:
        raise ValueError(f"the cluster gave {given} machine(s), accelerate's file is for {wanted}. Mend nodes in jobs/jobs.yaml.")
    port = ["--main_process_port", environment["MASTER_PORT"]] if environment.get("MASTER_PORT") else []
    if wanted == 1:
        return port
    rank = next((environment[name] for name in RANK_NAMES if environment.get(name)), None)
    addresses = environment.get("SKYPILOT_NODE_IPS", "").split() or [environment.get("MASTER_ADDR", "")]
    if rank is None or not addresses[0]:
        raise ValueError(
            f"{wanted} machines, but this one's rank ({', '.join(RANK_NAMES)}) or the first one's address (MASTER_ADDR, "
            "SKYPILOT_NODE_IPS) is not in the environment. Set NODE_RANK and MASTER_ADDR."
        )
    return ["--machine_rank", rank, "--main_process_ip", addresses[0], *port]


def accelerate(arguments: Sequence[str]) -> int:
    """accelerate's launcher in this process. Returns the exit code of the process that failed first; 0 if none did."""
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        launch_command(launch_command_parser().parse_args(arguments))
    except ChildFailedError as error:
        return error.get_first_failure()[1].exitcode
    except subprocess.CalledProcessError as error:
        return error.returncode
    return 0


def children(process: int) -> list[int]:
    """Ids of a process's children (Linux)."""
    try:
        return [int(child) for task in Path(f"/proc/{process}/task").iterdir() for child in (task / "children").read_text().split()]
    except FileNotFoundError:  # it has ended
        return []


def supervise(arguments: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run accelerate's launcher in a session of its own and pass signals on to its children alone. Returns the exit code."""
    program = [sys.executable, __file__, IN_PLACE, *arguments]
    stopped = False
    launcher = subprocess.Popen(program, env=environment, start_new_session=True)

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stopped
        stopped = True
        print(f"launch: {signal.Signals(number).name}: asking the training processes to save and leave", file=sys.stderr)
        for process in children(launcher.pid) or [launcher.pid]:
            try:
                os.kill(process, signal.SIGTERM)
            except ProcessLookupError:
                continue  # it has just ended

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, stop)
    code = launcher.wait()
    if stopped and code not in (0, 2):  # 2 is a mistake in the config, which stays one
        return RUN_AGAIN
    return code if code >= 0 else 128 - code


def main(arguments: Sequence[str]) -> int:
    if not arguments:
        print(__doc__)
        return 2
    if arguments[0] == IN_PLACE:
        code = accelerate(arguments[1:])
        return code if code >= 0 else 128 - code
    config_file = arguments[arguments.index("--config_file") + 1] if "--config_file" in arguments[:-1] else None
    try:
        place = arguments_of_place(os.environ, machines(config_file))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    pid_file = os.environ.get("SCIENCEFLOW_PID_FILE")
    if pid_file:
        Path(pid_file).write_text(str(os.getpid()))
    print("launch: accelerate launch", *place, *arguments, file=sys.stderr, flush=True)
    return supervise([*place, *arguments], {name: value for name, value in os.environ.items() if name not in WORKER_NAMES})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
