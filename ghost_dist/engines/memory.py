"""How much memory a device has left."""

from __future__ import annotations

import os

import torch


def free_bytes(device: torch.device) -> int:
    """Free memory of a device, in bytes, within what this process may use of it."""
    if device.type != "cuda":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    free, total = torch.cuda.mem_get_info(device)
    index = torch.cuda.current_device() if device.index is None else device.index
    allowed = torch.cuda.get_per_process_memory_fraction(index) * total
    return int(min(free, allowed - torch.cuda.memory_allocated(device)))
