"""Clocks: models that generate in turns, and some work over and over.

Each model is run by transformers' own ``generate``; the clock is read as each step's logits come
out. Models take turns, in another order every round, so that whatever else the machine does hits
all alike.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

from ghost_dist.devices import allocated_bytes, peak_bytes, reset_peak, synchronize

_REPEATED_S = 0.2
BATCH, PROMPT, NEW = 1, 512, 64  # a request, where nothing else is said


@dataclass(frozen=True)
class Turn:
    prefill_s: float  # until the logits of the first new token
    decode_s: float  # from there to those of the last
    tokens: Tensor  # generated, int64, (batch, new)
    peak_bytes: int | None  # of this model and what it computed; on a CPU it cannot be told apart
    cache_bytes: int = 0  # keys and values in the end

    @property
    def request_s(self) -> float:
        return self.prefill_s + self.decode_s


def take_turns(
    models: Mapping[str, Any], ids_BT: Tensor, new: int, rounds: int
) -> dict[str, list[Turn]]:
    """Let each model generate ``new`` tokens after ``ids_BT`` in every round; the first is dropped.

    The order is turned by one place from round to round.
    """
    names = list(models)
    turns: dict[str, list[Turn]] = {name: [] for name in names}
    for number in range(rounds + 1):
        first = number % len(names)
        for name in (*names[first:], *names[:first]):
            turn = _turn(models[name], ids_BT, new)
            if number > 0:
                turns[name].append(turn)
    return turns


def _turn(model: Any, ids_BT: Tensor, new: int) -> Turn:
    marks: list[float] = []
    device = ids_BT.device
    cuda = device.type == "cuda"

    def now() -> float:
        synchronize(device)
        return time.perf_counter()

    def mark(_: Tensor, scores: Tensor) -> Tensor:
        marks.append(now())
        return scores

    model.generation_config = transformers.GenerationConfig(
        max_new_tokens=new,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        return_dict_in_generate=True,
    )
    others = 0
    if cuda:
        reset_peak(device)
        others = allocated_bytes(device) - model.get_memory_footprint()
    began = now()
    found = model.generate(
        ids_BT, attention_mask=torch.ones_like(ids_BT), logits_processor=[mark], use_cache=True
    )
    peak = peak_bytes(device) - others if cuda else None
    assert len(marks) == new, "one forward a token"
    tokens = found.sequences[:, ids_BT.shape[1] :].cpu()
    held = sum(map(cached, getattr(found.past_key_values, "layers", ())))
    return Turn(marks[0] - began, marks[-1] - marks[0], tokens, peak, held)


def timed(work: Callable[[], Any], device: torch.device) -> float:
    """Median seconds of some work, warm; work that takes long is done four times in all."""
    spent: list[float] = []
    while len(spent) < 4 or (sum(spent) < _REPEATED_S and len(spent) < 50):
        synchronize(device)
        began = time.perf_counter()
        work()
        synchronize(device)
        spent.append(time.perf_counter() - began)
    return max(1e-9, statistics.median_high(spent[1:]))


def cached(layer: Any) -> int:
    """Bytes of keys and values that a layer of a cache holds."""
    tensors = (getattr(layer, name, None) for name in ("keys", "values"))
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)
