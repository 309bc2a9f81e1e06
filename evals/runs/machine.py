"""The device that is measured: its name in figures, in histories and in baselines."""

import platform
import re
from pathlib import Path

import torch


def gpu_name(device: str) -> str | None:
    """None if the run is on the CPU."""
    return torch.cuda.get_device_name() if device == "cuda" else None


def cpu_name(device: str) -> str | None:
    """The CPU's model if the system tells it, else its architecture; None if the run is on the GPU."""
    if device == "cuda":
        return None
    try:
        about = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        about = ""
    model = re.search(r"^model name[ \t]*:[ \t]*(\S.*?)[ \t]*$", about, re.MULTILINE)
    return model[1] if model else platform.machine() or "CPU"


def device_name(device: str, ranks: int = 1) -> str:
    """Runs on devices of one name can be compared: GPUs with their number, or a CPU with its threads and processes."""
    gpu, threads = gpu_name(device), torch.get_num_threads()
    if gpu is not None:
        return f"{ranks} x {gpu}" if ranks > 1 else gpu
    return f"{cpu_name(device)}, {threads} thread{'s' * (threads > 1)}" + f", {ranks} ranks" * (ranks > 1)


def slug(name: str) -> str:
    """A device's name for use in a file's name: intel-xeon-processor-2-threads."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", name.lower())).strip("-")
