"""Windows of calibration: from the sources of a run, and which of them folds hold."""

from collections.abc import Collection, Mapping

import numpy as np

from ghost_dist.calibration.split import folds_of_windows
from ghost_dist.calibration.windows import TokenWindows, build_windows, join_windows
from ghost_dist.errors import CalibrationError
from ghost_dist.pipeline.inputs import RunInputs
from ghost_dist.progress import Advance

MOST_UNSEEN = 1 / 3
"""Share of a text's tokens, as they occur, that may be unseen without a word; measured in
docs/guides/calibration_text.md."""


def calibration_windows(inputs: RunInputs, advance: Advance) -> TokenWindows:
    calibration, found = inputs.config.calibration, []
    for source, count in calibration.windows_of.items():
        try:
            windows = build_windows(
                source,
                inputs.tokenizer,
                windows=count,
                window_length=calibration.window_length,
                seed=calibration.seed,
                special_tokens=calibration.special_tokens,
                window_bos=calibration.window_bos is True,
                sampling=calibration.sampling,
                vocab_size=inputs.architecture.vocab_size,
                advance=advance,
            )
        except CalibrationError as error:
            if not calibration.sources:
                raise
            raise CalibrationError(
                f"One of calibration.sources: {error} Or take {source} out of calibration.sources, "
                "or give it a smaller share."
            ) from error
        found.append(windows)
    return join_windows(found)


def unlike(tokens: TokenWindows, evaluation: Mapping[str, TokenWindows]) -> list[str]:
    """What to say before the work of texts of whose tokens the calibration text lacks many."""
    seen, found = np.unique(tokens.tokens), []
    for name, corpus in evaluation.items():
        lacking = 1 - float(np.isin(corpus.tokens, seen).mean())
        if lacking > MOST_UNSEEN:
            found.append(
                f"{lacking:.0%} of the tokens of {name} are of kinds that never occur in the "
                "calibration text: it is too little, or text of another sort, and the repair may "
                "not hold there. Raise calibration.windows, or give text like yours: "
                "--set calibration.source=FILE, or several with their shares in "
                "calibration.sources."
            )
    return found


def fold_of_window(inputs: RunInputs, tokens: TokenWindows) -> list[int]:
    """The fold of every calibration window."""
    return folds_of_windows(tokens.tokens, tokens.source_of, inputs.config.folds)


def windows_of_folds(inputs: RunInputs, tokens: TokenWindows, folds: Collection[int]) -> list[int]:
    """Calibration windows that some folds hold, in order."""
    fold_of = enumerate(fold_of_window(inputs, tokens))
    return [window for window, fold in fold_of if fold in folds]
