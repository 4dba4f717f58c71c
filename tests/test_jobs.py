"""Jobs of all clusters come from one file, name configs and accelerate files that exist, and end in order when they are stopped."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import REPO

from OpenSciDraw.config import load_config

sys.path.insert(0, str(REPO / "jobs"))
import generate  # noqa: E402
import launch  # noqa: E402

FILES = generate.render()
COMMON, JOBS = generate.read()
AMLT = sorted(path for path in FILES if path.startswith("amlt/"))
SCRIPTS = [*sorted(path for path in FILES if path.endswith(".sbatch")), *map(str, sorted(REPO.glob("env_setup/*.sh")))]
RUNNER = REPO / "jobs" / "launch.py"


def commands(path: str) -> list[str]:
    """The shell commands of a generated file."""
    if path.endswith(".sbatch"):
        return [FILES[path]]
    values = yaml.safe_load(FILES[path])
    if path.startswith("amlt/"):
        return [*values["environment"]["setup"], *(line for job in values["jobs"] for line in job["command"])]
    return [values["command"]] if "command" in values else [values["setup"], values["run"]]


# -- the files ------------------------------------------------------------------------------------
def test_the_committed_files_are_what_the_one_source_gives() -> None:
    stale = [path for path, text in FILES.items() if (REPO / path).read_text() != text]
    assert not stale, "run `make jobs`"
    written = [*REPO.glob("amlt/*"), *(path for name in ("azureml", "slurm", "skypilot") for path in REPO.glob(f"jobs/{name}/*"))]
    assert {str(path.relative_to(REPO)) for path in written} == set(FILES)
    assert AMLT == ["amlt/encode.yaml", "amlt/train_flux2klein.yaml", "amlt/train_qwenimage.yaml"]


@pytest.mark.parametrize("path", AMLT)
def test_amlt_files_have_the_known_keys_and_a_right_sku(path: str) -> None:
    values = yaml.safe_load(FILES[path])
    assert set(values) == {"description", "target", "environment", "code", "storage", "jobs"}
    assert set(values["target"]) == {"service", "name", "workspace_name"} and values["target"]["service"] in ("sing", "aml")
    assert set(values["environment"]) == {"image", "setup"} and isinstance(values["environment"]["setup"], list)
    assert values["code"] == {"local_dir": "$CONFIG_DIR/.."}
    assert all(set(s) == {"storage_account_name", "container_name", "mount_dir"} for s in values["storage"].values())
    for job in values["jobs"]:
        assert set(job) == {
            "name", "sku", "process_count_per_node", "command", "identity", "submit_args", "sla_tier", "execution_mode",
            "priority", "tags",
        }  # fmt: skip
        assert re.fullmatch(r"\d+x\d+G\d+-[A-Z0-9]+", job["sku"])
        assert set(job["submit_args"]) == {"env", "max_run_duration_seconds"} and isinstance(job["command"], list)
        assert job["identity"] == "managed"


@pytest.mark.parametrize("path", AMLT)
def test_amlt_variables_are_the_users_with_one_dollar_and_the_jobs_with_two(path: str) -> None:
    values = yaml.safe_load(FILES[path])
    told = set(re.findall(r"export (\w+)=", FILES[path])) | {"CONFIG_DIR"}
    assert set(re.findall(r"(?<!\$)\$(?!\$)\{?(\w+)", yaml.safe_dump(values))) <= told
    names = {name for line in commands(path) for name in re.findall(r"\$\$(\w+)", line)}
    assert names <= set(values["jobs"][0]["submit_args"]["env"])
    assert values["jobs"][0]["submit_args"]["env"]["HF_TOKEN"] == "$${{secrets.HF_TOKEN}}"


@pytest.mark.parametrize("path", sorted(FILES))
def test_no_file_holds_a_secret_or_a_personal_path(path: str) -> None:
    text = FILES[path]
    assert not re.search(r"hf_[A-Za-z0-9]{8}|sk-[A-Za-z0-9]{8}|\b[0-9a-f]{40}\b|AccountKey|\bsig=|password", text)
    assert not re.search(r"/home/|/Users/|/root/|[\w.]+@[\w.]+\.\w+|[0-9a-f]{8}-[0-9a-f]{4}-", text)
    for name in generate.SECRETS:  # never a value
        assert not re.search(rf"{name}\s*[:=]\s*(?!null|\$\$\{{\{{secrets\.)\S", text), name


@pytest.mark.parametrize("path", sorted(FILES))
def test_each_job_names_files_that_exist_and_options_that_its_config_takes(path: str) -> None:
    (job,) = [job for job in JOBS if job.name == Path(path).stem]
    line = next(line for command in commands(path) for line in command.splitlines() if "jobs/launch.py" in line)
    words = shlex.split(line.rstrip("& "))
    words = words[words.index("jobs/launch.py") :]
    assert words[words.index("--config_file") + 1] == job.accelerate
    config = words[words.index("--cfg_options") - 1]
    assert job.config in config or "CONFIG" in config and f"CONFIG: {job.config}" in FILES[path]
    options = words[words.index("--cfg_options") + 1 :]
    resolved = load_config(REPO / job.config, [re.sub(r"\$\{\{[^}]*\}\}|\$\w+", "/mnt/x", option) for option in options])
    for folder in (resolved.model_output_dir, resolved.dataset.base_dir):
        assert folder.startswith(("/mnt/x/", COMMON.storage)), "on the storage, not on a machine that is given back"
    if job.name == "encode":
        assert resolved.encode.figures is not None and resolved.encode.figures.startswith(("/mnt/x/", COMMON.storage))


def test_all_clusters_ask_for_the_same_machines_and_time() -> None:
    for job in JOBS:
        amlt, azureml, sky = (
            yaml.safe_load(FILES[generate.CLUSTERS[name][0].format(job.name)]) for name in ("amlt", "azureml", "skypilot")
        )
        slurm = FILES[f"jobs/slurm/{job.name}.sbatch"]
        assert amlt["jobs"][0]["sku"] == f"{job.nodes}x{COMMON.gpu_memory_gb}G{job.gpus}-A100"
        assert azureml["resources"]["instance_count"] == sky["num_nodes"] == job.nodes
        assert sky["resources"]["accelerators"].endswith(f":{job.gpus}")
        assert f"#SBATCH --nodes={job.nodes}\n" in slurm and f"#SBATCH --gpus-per-node={job.gpus}\n" in slurm
        seconds = amlt["jobs"][0]["submit_args"]["max_run_duration_seconds"]
        assert azureml["limits"]["timeout"] == seconds == job.hours * 3600 and f"--time={job.hours}:00:00" in slurm


def test_nodes_that_are_not_those_of_the_accelerate_file_are_refused(tmp_path: Path) -> None:
    wrong = yaml.safe_load(generate.SOURCE.read_text())
    wrong["jobs"]["encode"]["nodes"] = 2
    (tmp_path / "jobs.yaml").write_text(yaml.safe_dump(wrong))
    with pytest.raises(ValueError, match="encode: nodes 2 x gpus 4, but accelerate_cfg/1m4g_bf16.yaml"):
        generate.read(tmp_path / "jobs.yaml")


@pytest.mark.parametrize("path", [*SCRIPTS, *sorted(path for path in FILES if not path.endswith(".sbatch"))])
def test_every_shell_part_parses(path: str) -> None:
    for text in [(REPO / path).read_text()] if path in SCRIPTS else commands(path):
        text = re.sub(r"\$\{\{[^}]*\}\}", "x", text.replace("$$", "$"))
        subprocess.run(["bash", "-n"], input=text, text=True, check=True, timeout=10)


@pytest.mark.parametrize("path", SCRIPTS)
def test_shellcheck_finds_nothing(path: str) -> None:
    program = shutil.which("shellcheck") or shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    if program is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run([program, str(REPO / path)], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stdout


# -- the launcher -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "environment",
    [
        {"SLURM_NODEID": "1", "SLURM_JOB_NUM_NODES": "2", "MASTER_ADDR": "a", "MASTER_PORT": "20123"},
        {"SKYPILOT_NODE_RANK": "1", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_IPS": "a\nb\n", "MASTER_PORT": "20123"},
        {"NODE_RANK": "1", "AZUREML_NODE_COUNT": "2", "MASTER_ADDR": "a", "MASTER_PORT": "20123", "RANK": "1"},
    ],
    ids=["slurm", "skypilot", "azureml"],
)
def test_rank_and_address_come_from_the_clusters_environment(environment: dict[str, str]) -> None:
    wanted = ["--machine_rank", "1", "--main_process_ip", "a", "--main_process_port", "20123"]
    assert launch.arguments_of_place(environment, 2) == wanted
    with pytest.raises(ValueError, match="the cluster gave 2 machine"):
        launch.arguments_of_place(environment, 1)


def test_several_machines_without_an_address_are_refused_and_one_needs_none() -> None:
    with pytest.raises(ValueError, match="Set NODE_RANK and MASTER_ADDR"):
        launch.arguments_of_place({"SLURM_NODEID": "0"}, 2)
    assert launch.arguments_of_place({}, 1) == []
    assert launch.machines(str(REPO / "accelerate_cfg" / "2m8g_bf16.yaml")) == 2


TRAINER = """
import os, signal, sys, time
from pathlib import Path
folder, mode = Path(sys.argv[1]), sys.argv[2]
rank = os.environ.get("RANK", "0")
count = 0
def note(number, frame):
    global count
    count += 1
if mode == "train":
    signal.signal(signal.SIGTERM, note)
(folder / f"started-{rank}").touch()
if mode.isdecimal():
    sys.exit(int(mode))
while not count:
    time.sleep(0.05)
time.sleep(1)  # a checkpoint that takes a while
(folder / f"saved-{rank}").write_text(str(count))
while len(list(folder.glob("saved-*"))) < int(os.environ.get("WORLD_SIZE", "1")):
    time.sleep(0.05)  # as a checkpoint ends: when every rank is done
sys.exit(75)
"""


def accelerate_file(folder: Path, processes: int) -> Path:
    values = yaml.safe_load((REPO / "accelerate_cfg" / ("1m4g_bf16.yaml" if processes > 1 else "1m1g.yaml")).read_text())
    (folder / "accelerate.yaml").write_text(yaml.safe_dump({**values, "num_processes": processes, "main_process_port": 0}))
    return folder / "accelerate.yaml"


def start(folder: Path, processes: int, mode: str) -> subprocess.Popen[bytes]:
    (folder / "trainer.py").write_text(TRAINER)
    words = ["--config_file", str(accelerate_file(folder, processes)), str(folder / "trainer.py"), str(folder), mode]
    environment = {**os.environ, "SCIENCEFLOW_PID_FILE": str(folder / "pid")}
    with (folder / "stderr").open("w") as file:
        return subprocess.Popen([sys.executable, str(RUNNER), *words], stderr=file, cwd=folder, env=environment)


def said(folder: Path) -> str:
    return (folder / "stderr").read_text()


def wait_for(*paths: Path) -> None:
    deadline = time.monotonic() + 40
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline, paths
        time.sleep(0.05)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_signal_lets_every_process_save_once_and_asks_to_run_again(tmp_path: Path, processes: int) -> None:
    process = start(tmp_path, processes, "train")
    wait_for(*(tmp_path / f"started-{rank}" for rank in range(processes)))
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGTERM)
    assert process.wait(timeout=60) == 75, said(tmp_path)
    assert "death signal" not in said(tmp_path), "torchrun was told as well: it signals again, and kills after 30 seconds"
    assert [(tmp_path / f"saved-{rank}").read_text() for rank in range(processes)] == ["1"] * processes


def test_a_program_that_does_not_wait_for_signals_is_run_again_as_well(tmp_path: Path) -> None:
    """As `scienceflow encode`: what is finished is on disk."""
    process = start(tmp_path, 2, "encode")
    wait_for(*(tmp_path / f"started-{rank}" for rank in range(2)))
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=60) == 75, said(tmp_path)


def test_the_exit_code_is_that_of_the_process_that_failed(tmp_path: Path) -> None:
    process = start(tmp_path, 2, "2")
    assert process.wait(timeout=60) == 2, said(tmp_path)


SCONTROL = """#!/bin/sh
echo "$@" >> "$CALLS"
[ "$1" = show ] && printf 'first\\nsecond\\n' || true
"""
SRUN = """#!/bin/sh
echo "srun $*" >> "$CALLS"
shift
exec "$@"
"""
STOPPABLE = """#!/bin/sh
echo "MASTER_ADDR=$MASTER_ADDR" >> "$CALLS"
[ "$MODE" = 0 ] || exit "$MODE"
trap 'exit 75' TERM
echo $$ > "$SCIENCEFLOW_PID_FILE"
touch "$STARTED"
while :; do sleep 0.05; done
"""


@pytest.mark.parametrize("mode", ["stopped", "2", "75"])
def test_the_slurm_script_goes_back_into_the_queue_after_a_signal_alone(tmp_path: Path, mode: str) -> None:
    """Slurm's programs are stand-ins here: what counts is what the script asks of them."""
    for name, text in (("scontrol", SCONTROL), ("srun", SRUN), ("python", STOPPABLE)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    calls, started = tmp_path / "calls", tmp_path / "started"
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(calls), "STARTED": str(started), "TMPDIR": str(tmp_path),
        "MODE": "0" if mode == "stopped" else mode, "SCIENCEFLOW_PYTHON": str(tmp_path / "python"),
        "SCIENCEFLOW_STORAGE": "/a folder", "SLURM_SUBMIT_DIR": str(REPO), "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_JOB_ID": "42", "SLURM_CPUS_PER_TASK": "8",
    }  # fmt: skip
    script = REPO / "jobs" / "slurm" / "train_flux2klein.sbatch"
    process = subprocess.Popen(["bash", str(script)], env=environment, text=True, stdout=subprocess.PIPE)
    if mode == "stopped":
        wait_for(started)
        process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    asked = calls.read_text()
    assert "MASTER_ADDR=first\n" in asked and "base_filesys_path=/a folder" in asked
    assert process.returncode == (75 if mode == "stopped" else int(mode))
    assert ("requeue 42" in asked) == (mode != "2")
