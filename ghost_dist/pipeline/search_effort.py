"""How much a search for layers does, and the windows that it fits on and judges by."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ghost_dist.calibration.split import judging_pieces, spread
from ghost_dist.calibration.windows import Tokens, TokenWindows
from ghost_dist.config import CalibrationConfig, Config, SelectionConfig
from ghost_dist.pipeline.inputs import RunInputs
from ghost_dist.pipeline.texts import windows_of_folds
from ghost_dist.solver.search import Judges

_LONGEST, _SHORTEST = 512, 128  # tokens of a judging window
_PIECES = 4  # of these that every source should give
_FEWEST_TOKENS, _MOST_TOKENS = 1024, 65536  # to judge by; of calibration, that a share is judged by


@dataclass(frozen=True)
class Effort:
    """How much a search does."""

    rounds: float  # budget, in evaluations of its greedy part
    judged: float  # share of the calibration tokens
    fitted_per_channel: int  # tokens, but no fewer than
    fewest_fitted: int
    width: int | None  # removals of a generation; None: all

    def fit_windows(self, width: int, length: int) -> int:
        """Windows of a length that operators of a width are fitted on."""
        return -(-max(self.fewest_fitted, self.fitted_per_channel * width) // length)

    def length(self, calibration: CalibrationConfig, sources: int) -> int:
        """Tokens of a judging window; those of calibration are cut into such pieces."""
        length = _LONGEST
        while length > _SHORTEST and length * sources * _PIECES > self.tokens(calibration):
            length //= 2
        return min(length, calibration.window_length)

    def judges(
        self, calibration: CalibrationConfig, sources: int, of_source: int, rough: bool
    ) -> Judges:
        """Judging windows, of so many calibration windows of every source."""
        length = self.length(calibration, sources)
        most = max(1, self.tokens(calibration) // (sources * length))
        return Judges(sources, min(of_source * _pieces(calibration, length), most), rough)

    def tokens(self, calibration: CalibrationConfig) -> int:
        """Most tokens of all judging windows."""
        there = calibration.windows * calibration.window_length
        return max(_FEWEST_TOKENS, int(self.judged * min(there, _MOST_TOKENS)))


EFFORTS = {
    "quick": Effort(1.25, 1 / 8, 16, 1 << 10, 12),
    "normal": Effort(1.6, 1 / 8, 32, 1 << 15, None),
    "thorough": Effort(4.0, 1 / 4, 64, 1 << 16, None),
}


@dataclass(frozen=True)
class Windows:
    """What a search fits on and judges by."""

    fitted: Tokens  # (windows, T)
    source_of: list[int]  # of every one of these, the number of its source, or piece of one
    judged: Tokens  # (windows, at most T); their sources are those of judges
    judges: Judges

    @staticmethod
    def of(inputs: RunInputs, tokens: TokenWindows) -> Windows:
        """Windows spread over every source to fit on, and others to judge by.

        Half of these are what is least like the rest: on text like most of the calibration text,
        removals seem alike of which one does far more harm elsewhere.
        """
        config, effort = inputs.config, effort_of(inputs.config.selection)
        of_source = [windows_of_folds(inputs, tokens, folds) for folds in config.left_out]
        sources, fewest = len(of_source), min(map(len, of_source))
        length = effort.length(config.calibration, sources)
        used = length * _pieces(config.calibration, length)
        most = effort.fit_windows(inputs.architecture.hidden_size, tokens.window_length)
        fitted = [spread(windows, -(-most // sources)) for windows in of_source]
        judges = effort.judges(config.calibration, sources, fewest, repairs(config))
        pieces = [tokens.tokens[windows, :used].reshape(-1, length) for windows in of_source]
        numbers = judging_pieces(pieces, judges.pieces)
        judged = [part[chosen] for part, chosen in zip(pieces, numbers, strict=True)]
        return Windows(
            tokens.tokens[[window for windows in fitted for window in windows]],
            [number for number, windows in enumerate(fitted) for _ in windows],
            np.stack(judged, 1).reshape(-1, length),
            judges,
        )


def repairs(config: Config) -> bool:
    """Whether removals are judged with operators in place; not where none will be there."""
    return config.operator.name != "none"


def effort_of(selection: SelectionConfig) -> Effort:
    return EFFORTS["normal" if isinstance(selection.effort, int) else selection.effort]


def _pieces(calibration: CalibrationConfig, length: int) -> int:
    """Judging windows that one of calibration gives; a piece inside it has no BOS."""
    return 1 if calibration.window_bos is True else max(1, calibration.window_length // length)
