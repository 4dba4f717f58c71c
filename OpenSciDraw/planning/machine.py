"""What `doctor` finds of the machine: CPU memory, GPUs, driver, precision, attention, what lies between GPUs."""

from __future__ import annotations

import os
import resource
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from OpenSciDraw.config import Config

GB = 1e9
MIN_SHM_BYTES = 1e9  # data workers hand over batches through it; Docker gives 64 MB
MIN_OPEN_FILES = 4096  # each data worker keeps up to 128 shards open


@dataclass(frozen=True)
class Finding:
    """One line. `remedy` says what to do; it belongs to everything that is not ok."""

    level: Literal["ok", "warning", "FAIL"]
    text: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.level:<8} {self.text}" + (f"\n         -> {self.remedy}" if self.remedy else "")


def check_host(config: Config | None) -> Iterator[Finding]:
    """Memory, shared memory for data workers, open files."""
    memory = memory_bytes()
    if memory is not None:
        yield Finding("ok", f"{memory / GB:.0f} GB of memory, {os.cpu_count()} CPU cores")
    workers = 2 if config is None else config.dataloader_num_workers
    shm = Path("/dev/shm")
    if shm.is_dir() and workers:
        size = shutil.disk_usage(shm).total
        few = size < MIN_SHM_BYTES
        remedy = "Start the container with --shm-size=16g or --ipc=host, or set dataloader_num_workers = 0." if few else ""
        yield Finding("warning" if few else "ok", f"/dev/shm has {size / GB:.2f} GB for {workers} data worker(s)", remedy)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < MIN_OPEN_FILES:
        limit = "unlimited" if hard == resource.RLIM_INFINITY else hard
        yield Finding("warning", f"at most {soft} open files (hard limit {limit})", f"ulimit -n {MIN_OPEN_FILES} before training")


def memory_bytes() -> int | None:
    """Memory that this process may use: the machine's, or a container's limit. None where it cannot be read."""
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return None
    limits = [Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")]
    given = [path.read_text().strip() for path in limits if path.is_file()]
    return min([total, *(int(text) for text in given if text.isdecimal())])


def check_gpus(config: Config | None) -> Iterator[Finding]:
    import torch

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if torch.backends.mps.is_available():
        yield Finding("ok", "an Apple GPU (MPS; never tried): use mixed_precision = 'fp16'")
        return
    if not count:
        yield no_gpu(torch.version.cuda, driver_version(), [str(w.message).splitlines()[0] for w in caught])
        yield cpu_precision(cpu_has_bf16(), None if config is None else config.mixed_precision)
        return
    yield Finding("ok", f"CUDA {torch.version.cuda} of torch, driver {driver_version() or 'unknown'}")
    oldest = (99, 0)
    for index in range(count):
        properties = torch.cuda.get_device_properties(index)
        oldest = min(oldest, (properties.major, properties.minor))
        free, total = torch.cuda.mem_get_info(index)
        used = total - free
        text = f"GPU {index}: {properties.name}, {total / GB:.1f} GB, compute capability {properties.major}.{properties.minor}"
        busy = used > 0.1 * total
        remedy = f"{used / GB:.1f} GB of it are taken: see nvidia-smi, or choose others by CUDA_VISIBLE_DEVICES." if busy else ""
        yield Finding("warning" if busy else "ok", text, remedy)
    yield precision(oldest, None if config is None else config.mixed_precision)
    yield attention(oldest)
    if count > 1:
        yield between_gpus(count)


def driver_version() -> str | None:
    """Version of NVIDIA's kernel driver; None where there is none."""
    path = Path("/proc/driver/nvidia/version")
    if path.is_file():
        words = path.read_text().split()
        return next((word for word in words if word[:1].isdigit() and "." in word), "unknown")
    return "unknown" if shutil.which("nvidia-smi") else None


def no_gpu(cuda: str | None, driver: str | None, said: list[str]) -> Finding:
    """Why torch (built for `cuda`) sees no GPU on a machine with `driver`; `said`: its own warnings."""
    if driver is None:
        return Finding("warning", "no GPU here: training runs on the CPU", "Good for the embedded models; see configs/tiny/.")
    reason = f": {said[0]}" if said else ""
    if cuda is None:
        remedy = "Install torch for CUDA: https://pytorch.org/get-started/locally names the command."
        return Finding("FAIL", f"an NVIDIA driver ({driver}) is here, but this torch is built for CPUs", remedy)
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return Finding("FAIL", "CUDA_VISIBLE_DEVICES hides every GPU", "unset CUDA_VISIBLE_DEVICES, or name GPUs in it")
    remedy = f"Update the driver to one for CUDA {cuda}, or install one for an older CUDA. In a container: docker run --gpus all."
    return Finding("FAIL", f"torch (CUDA {cuda}) sees no GPU, though a driver ({driver}) is here{reason}", remedy)


def cpu_has_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool | None:
    """Whether the processor computes in bf16 (flags of Linux on x86 and ARM); None where that cannot be read."""
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & set(cpuinfo.read_text().split())) if cpuinfo.is_file() else None


def cpu_precision(has: bool | None, wanted: str | None) -> Finding:
    """torch imitates bf16 where the processor lacks it: several times slower than fp32."""
    if has is not False:
        return Finding("ok", "bf16 on the CPU" if has else "whether the CPU has bf16 is not known")
    if wanted == "bf16":
        text = "mixed_precision = 'bf16', which this processor only imitates, several times slower than fp32"
        return Finding("warning", text, "Set mixed_precision = 'no'.")
    return Finding("ok", "no bf16 on the CPU: use mixed_precision = 'no' there")


def precision(capability: tuple[int, int], wanted: str | None) -> Finding:
    """bf16 came with compute capability 8.0; torch emulates it before, slowly."""
    has = capability >= (8, 0)
    if wanted == "bf16" and not has:
        return Finding("FAIL", "mixed_precision = 'bf16', which this GPU does not have", "Set mixed_precision = 'fp16'.")
    return Finding("ok", "bf16" if has else "no bf16: use mixed_precision = 'fp16'")


def attention(capability: tuple[int, int]) -> Finding:
    """Which of torch's attention kernels can run; diffusers takes the fastest by itself."""
    import torch

    backends = torch.backends.cuda
    there = {
        "flash": capability >= (8, 0) and backends.is_flash_attention_available() and backends.flash_sdp_enabled(),
        "cuDNN": capability >= (8, 0) and torch.backends.cudnn.is_available() and backends.cudnn_sdp_enabled(),
        "memory-efficient": backends.mem_efficient_sdp_enabled(),
    }
    names = [name for name, is_there in there.items() if is_there]
    if not names:
        return Finding("warning", "attention: the plain kernel only, which needs much memory", "Reinstall torch.")
    return Finding("ok", f"attention kernels: {', '.join(names)}")


def between_gpus(count: int) -> Finding:
    """Whether GPUs reach one another directly, and which of NCCL's settings slow them down."""
    import torch

    direct = all(torch.cuda.can_device_access_peer(0, other) for other in range(1, count))
    slowing = [f"{name}=1" for name in ("NCCL_P2P_DISABLE", "NCCL_IB_DISABLE", "NCCL_SHM_DISABLE") if os.environ.get(name) == "1"]
    text = f"{count} GPUs, {'with' if direct else 'without'} direct access to one another"
    if slowing:
        return Finding("warning", f"{text}; {', '.join(slowing)}", "Unset these unless training hangs without them: they slow it.")
    return Finding("ok", text)
