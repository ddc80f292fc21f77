"""Facts about the machine that a measured number depends on."""

import functools
import os
import platform
import re
from pathlib import Path
from typing import Any


def facts(device: str = "cpu") -> dict[str, Any]:
    """Name, cores, memory and library versions of the device that a result was measured on.

    Args:
        device: "cpu" or a torch device string such as "cuda:0".

    Returns:
        JSON-ready dict; memory in GiB. Host names and user names are left out.
    """
    import torch

    found: dict[str, Any] = {
        "device": device,
        "cpu": cpu_name(),
        "cores": usable_cores(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
    if torch.device(device).type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": properties.name,
            "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
            "compute_capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
        }
    return found


def slug(device: str = "cpu") -> str:
    """Short name for file names: "cpu", or the GPU's model, e.g. "h200"."""
    import torch

    if torch.device(device).type != "cuda":
        return torch.device(device).type
    name = torch.cuda.get_device_name(device).lower()
    words = [word for word in re.findall(r"[a-z0-9]+", name) if word not in ("nvidia", "geforce", "tesla", "amd")]
    return "-".join(words) or "cuda"


def usable_cores() -> int:
    """Cores that this process may run on (a container's share, not the machine's)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def cpu_name() -> str:
    """The processor's marketing name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
