"""Writes the job files of all clusters from jobs.yaml: `make jobs`. `--check` writes nothing and fails when one is out of date."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

REPO = Path(__file__).resolve().parents[1]
SOURCE = REPO / "jobs" / "jobs.yaml"
SECRETS = ("HF_TOKEN", "WANDB_API_KEY")
INSTALL = "python -m pip install"  # pip keeps the image's torch


@dataclass(frozen=True)
class Common:
    """What all jobs share; jobs.yaml says what each is."""

    gpu_memory_gb: int
    gpu: Mapping[str, str]
    cpus_per_gpu: int
    memory_gb_per_gpu: int
    shm_gb: int
    disk_gb: int
    image: Mapping[str, str]
    storage: str
    sla_tier: str
    priority: str
    stop_before_end_seconds: int


@dataclass(frozen=True)
class Job:
    """One job: a program and its config on `nodes` machines with `gpus` GPUs each."""

    name: str
    description: str
    program: str
    config: str
    options: tuple[str, ...]
    accelerate: str
    nodes: int
    gpus: int
    hours: int

    def command(self, python: str, storage: str, config: str) -> str:
        """The command of one machine. `storage` and `config` are put in as they are, so that a shell can fill them in."""
        options = " ".join([f"base_filesys_path={storage}", *self.options])
        return f"{python} jobs/launch.py --config_file {self.accelerate} {self.program} {config} --cfg_options {options}"


def read(source: Path = SOURCE) -> tuple[Common, list[Job]]:
    """jobs.yaml. Raises TypeError for a missing or unknown key, ValueError when nodes and GPUs are not accelerate's."""
    given = yaml.safe_load(source.read_text())
    jobs = [Job(name=name, **{**values, "options": tuple(values["options"])}) for name, values in given["jobs"].items()]
    for job in jobs:
        launch = yaml.safe_load((REPO / job.accelerate).read_text())
        found = (launch["num_machines"], launch["num_processes"])
        if found != (job.nodes, job.nodes * job.gpus):
            raise ValueError(
                f"{job.name}: nodes {job.nodes} x gpus {job.gpus}, but {job.accelerate} is for {found[1]} processes on {found[0]} "
                "machine(s). Make them agree in jobs.yaml."
            )
    return Common(**given["common"]), jobs


# -- each cluster -----------------------------------------------------------------------------------
def amlt(common: Common, job: Job) -> str:
    """$NAME is filled in from the environment of whoever runs `amlt run`; $$ stays one $ for the job."""
    variables = {
        "SCIENCEFLOW_CLUSTER": "virtual cluster", "SCIENCEFLOW_WORKSPACE": "Azure ML workspace",
        "SCIENCEFLOW_STORAGE_ACCOUNT": "storage account", "SCIENCEFLOW_CONTAINER": "its container",
    }  # fmt: skip
    values = {
        "description": f"ScienceFlow. {job.description}",
        "target": {"service": "sing", "name": "$SCIENCEFLOW_CLUSTER", "workspace_name": "$SCIENCEFLOW_WORKSPACE"},
        "environment": {"image": common.image["amlt"], "setup": [f"{INSTALL} --user -e ."]},
        "code": {"local_dir": "$CONFIG_DIR/.."},
        "storage": {
            "scienceflow": {
                "storage_account_name": "$SCIENCEFLOW_STORAGE_ACCOUNT",
                "container_name": "$SCIENCEFLOW_CONTAINER",
                "mount_dir": common.storage,
            }
        },
        "jobs": [
            {
                "name": job.name,
                "sku": f"{job.nodes}x{common.gpu_memory_gb}G{job.gpus}-{common.gpu['amlt']}",
                "process_count_per_node": 1,  # the launcher starts one for each GPU
                "command": [job.command("python", common.storage, '"$$CONFIG"')],
                "identity": "managed",
                "submit_args": {
                    "env": {"CONFIG": job.config, **{name: f"$${{{{secrets.{name}}}}}" for name in SECRETS}},
                    "max_run_duration_seconds": job.hours * 3600,
                },
                "sla_tier": common.sla_tier,
                "execution_mode": "basic",
                "priority": common.priority,
                "tags": ["ScienceFlow", job.name],
            }
        ],
    }
    exports = [f"export {name}=…  # {meaning}" for name, meaning in variables.items()]
    return _header("amlt run -d <cluster_name> amlt/" + f"{job.name}.yaml -y", *exports) + _yaml(values)


def azureml(common: Common, job: Job) -> str:
    secrets = f"python jobs/key_vault.py {' '.join(SECRETS)} --"
    install = f"{INSTALL} -e . azure-identity azure-keyvault-secrets"
    values = {
        "$schema": "https://azuremlschemas.azureedge.net/latest/commandJob.schema.json",
        "type": "command",
        "experiment_name": "scienceflow",
        "display_name": job.name,
        "description": job.description,
        "code": "../..",
        "command": f"{install} && {secrets} " + job.command("python", "${{outputs.storage}}", '"$CONFIG"'),
        "environment": {"image": f"docker.io/{common.image['docker']}"},
        "environment_variables": {"CONFIG": job.config, "KEY_VAULT_URL": ""},
        "compute": "azureml:gpu-cluster",
        "resources": {"instance_count": job.nodes, "shm_size": f"{common.shm_gb}g"},
        "distribution": {"type": "pytorch", "process_count_per_instance": 1},
        "outputs": {
            "storage": {
                "type": "uri_folder", "mode": "rw_mount", "path": "azureml://datastores/workspaceblobstore/paths/scienceflow",
            }
        },
        "identity": {"type": "managed"},
        "limits": {"timeout": job.hours * 3600},
    }  # fmt: skip
    run = (
        f"az ml job create --file jobs/azureml/{job.name}.yaml --set compute=azureml:MY_CLUSTER "
        "environment_variables.KEY_VAULT_URL=https://MY_VAULT.vault.azure.net"
    )
    return _header(run, f"The cluster's machines need {job.gpus} GPU(s) of {common.gpu_memory_gb} GB each.") + _yaml(values)


def slurm(common: Common, job: Job) -> str:
    directives = {
        "job-name": job.name,
        "nodes": job.nodes,
        "ntasks-per-node": 1,
        "gpus-per-node": job.gpus,
        "cpus-per-task": job.gpus * common.cpus_per_gpu,
        "mem": f"{job.gpus * common.memory_gb_per_gpu}G",
        "time": f"{job.hours}:00:00",
        "signal": f"B:TERM@{common.stop_before_end_seconds}",
        "requeue": None,
        "open-mode": "append",
        "output": "%x-%j.out",
    }
    lines = [f"#SBATCH --{name}" + ("" if value is None else f"={value}") for name, value in directives.items()]
    usage = _header(
        f"sbatch --export=ALL,SCIENCEFLOW_STORAGE=/path/of/the/storage jobs/slurm/{job.name}.sbatch",
        "Run it in the repository. Partition and account: SBATCH_PARTITION, SBATCH_ACCOUNT or sbatch's own options.",
        "CONFIG is another config than the one below, SCIENCEFLOW_PYTHON another interpreter than .venv/bin/python.",
    )
    srun = 'srun --cpus-per-task="$SLURM_CPUS_PER_TASK" '
    command = job.command('"$python"', '"$SCIENCEFLOW_STORAGE"', f'"${{CONFIG:-{job.config}}}"')
    return "\n".join(["#!/usr/bin/env bash", *lines, usage.rstrip(), _SLURM_BEFORE, srun + command + " &", _SLURM_AFTER])


_SLURM_BEFORE = """\
set -euo pipefail

cd "$SLURM_SUBMIT_DIR"
if [[ -z "${SCIENCEFLOW_STORAGE:-}" ]]; then
    echo "error: SCIENCEFLOW_STORAGE is not set: the folder, seen by all nodes, that holds figures/, data/ and runs/." >&2
    exit 2
fi
python="${SCIENCEFLOW_PYTHON:-.venv/bin/python}"
hosts="$(scontrol show hostnames "$SLURM_JOB_NODELIST")"
MASTER_ADDR="${hosts%%$'\\n'*}"
MASTER_PORT="$((20000 + SLURM_JOB_ID % 10000))"
SCIENCEFLOW_PID_FILE="${TMPDIR:-/tmp}/scienceflow-$SLURM_JOB_ID.pid"
export MASTER_ADDR MASTER_PORT SCIENCEFLOW_PID_FILE

# Slurm sends TERM to this shell alone (B:). It goes to the launcher of this node; all ranks stop with its own. Through Slurm it
# would reach every process of the job, data workers too, and nothing could be saved.
trap 'kill -TERM "$(cat "$SCIENCEFLOW_PID_FILE")" || true' TERM
"""
_SLURM_AFTER = """\
job=$!
code=0
wait "$job" || code=$?
while kill -0 "$job" 2>/dev/null; do # it was the signal that ended `wait`
    code=0
    wait "$job" || code=$?
done
rm -f "$SCIENCEFLOW_PID_FILE"

if [[ "$code" -eq 75 ]]; then
    echo "stopped by a signal, the work is saved: back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


def skypilot(common: Common, job: Job) -> str:
    values = {
        "name": job.name.replace("_", "-"),
        "workdir": ".",
        "num_nodes": job.nodes,
        "resources": {
            "accelerators": f"{common.gpu['skypilot']}:{job.gpus}",
            "use_spot": True,
            "disk_size": common.disk_gb,
            "image_id": f"docker:{common.image['docker']}",
            "job_recovery": {"recover_on_exit_codes": [75]},
        },
        "envs": {"CONFIG": job.config, "SCIENCEFLOW_BUCKET": None},
        "secrets": {name: None for name in SECRETS},
        "file_mounts": {common.storage: {"source": "${SCIENCEFLOW_BUCKET}", "mode": "MOUNT_CACHED"}},
        "setup": f"{INSTALL} -e .",
        "run": job.command("python", common.storage, '"$CONFIG"'),
    }
    run = (
        f"sky jobs launch jobs/skypilot/{job.name}.yaml --env SCIENCEFLOW_BUCKET=s3://MY_BUCKET "
        + " ".join(f"--secret {name}" for name in SECRETS)
    )
    return _header(run, "The bucket can be of any store that SkyPilot mounts: s3://, gs://, https://… of Azure.") + _yaml(values)


CLUSTERS: dict[str, tuple[str, Callable[[Common, Job], str]]] = {
    "amlt": ("amlt/{}.yaml", amlt),
    "azureml": ("jobs/azureml/{}.yaml", azureml),
    "slurm": ("jobs/slurm/{}.sbatch", slurm),
    "skypilot": ("jobs/skypilot/{}.yaml", skypilot),
}


# -- files -------------------------------------------------------------------------------------------
def _header(command: str, *notes: str) -> str:
    lines = ["Written by `make jobs` from jobs/jobs.yaml: change it there. See docs/clusters.md.", "", f"  {command}", *notes]
    return "".join(f"# {line}".rstrip() + "\n" for line in lines)


def _yaml(values: dict[str, Any]) -> str:
    text: str = yaml.safe_dump(values, sort_keys=False, width=10_000, allow_unicode=True)
    return text


def render() -> dict[str, str]:
    """Every generated file: path in the repository -> text."""
    common, jobs = read()
    return {path.format(job.name): write(common, job) for path, write in CLUSTERS.values() for job in jobs}


def main(arguments: list[str]) -> int:
    stale = [path for path, text in render().items() if not (REPO / path).exists() or (REPO / path).read_text() != text]
    if "--check" in arguments:
        for path in stale:
            print(f"{path} is not what jobs/jobs.yaml gives: run `make jobs`", file=sys.stderr)
        return 1 if stale else 0
    for path, text in render().items():
        (REPO / path).parent.mkdir(parents=True, exist_ok=True)
        (REPO / path).write_text(text)
    print(f"{len(stale)} file(s) changed")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
