"""Names that rates are kept under, and the folder that a run will be in."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

from ghost_dist.devices import gpu_name


def device_name(device: torch.device) -> str:
    """Of a GPU with its driver's version, or of the CPU with the number of threads."""
    if device.type == "cuda":
        driver = Path("/proc/driver/nvidia/version")
        version = driver.read_text().split("  ")[1:2] if driver.exists() else []
        return " ".join([gpu_name(device), *version])
    info = Path("/proc/cpuinfo")
    names = [
        line.partition(":")[2].strip()
        for line in (info.read_text().splitlines() if info.exists() else [])
        if line.startswith("model name")
    ]
    name = names[0] if names else platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


def existing_folder(path: Path) -> Path:
    """The folder itself, or the nearest one above it that exists."""
    path = path.expanduser().absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())
