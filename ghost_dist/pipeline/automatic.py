"""What `auto` means where the configuration alone, and the kind of device, decide it."""

import torch

from ghost_dist.checkpoint.reader import Checkpoint
from ghost_dist.config import Config
from ghost_dist.engines.resident import auto_batch
from ghost_dist.errors import ConfigError

_TOKENS_OF_RANGE = 1 << 16


def compute_dtype(config: Config, source: Checkpoint, device: torch.device) -> torch.dtype:
    """The compute dtype; auto is the checkpoint's own, on a CPU only where that computes fast.

    A CPU without instructions for products of bfloat16 takes many times as long as in float32, and
    one with them a quarter; float16 is slow on most.
    """
    if config.model.dtype != "auto":
        dtype: torch.dtype = getattr(torch, config.model.dtype)
        return dtype
    fast = device.type != "cpu" or (source.dtype == torch.bfloat16 and _multiplies_bfloat16())
    return source.dtype if fast else torch.float32


def _multiplies_bfloat16() -> bool:
    found = torch.cpu.get_capabilities()
    return any(found.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


def count_ranges(config: Config) -> int:
    """Each is written whole, so more of them than a stop may cost again only cost time."""
    calibration, folds = config.calibration, config.folds
    tokens = calibration.windows * calibration.window_length
    of_fold = 1 if tokens <= folds * _TOKENS_OF_RANGE else 2
    ranges = calibration.ranges or min(of_fold * folds, calibration.windows)
    if ranges > calibration.windows:
        raise ConfigError(
            f"calibration.ranges={ranges} is more than calibration.windows={calibration.windows}; "
            "each range holds at least one window."
        )
    if ranges < folds:
        raise ConfigError(
            f"operator.folds={folds} needs at least {folds} window ranges, but there are {ranges} "
            f"(calibration.windows={calibration.windows}). Give more windows or fewer folds."
        )
    return ranges


def batch_of(config: Config, device: torch.device) -> int:
    if config.engine.batch != "auto":
        return config.engine.batch
    calibration = config.calibration
    shorter = calibration.windows // count_ranges(config)
    return auto_batch(device, calibration.window_length, shorter)
