"""Scores of one mask against the true one, in both conventions in use. All masks are bool [H, W], same shape.

Crab+'s own mask stage: J = |P and G| / |P or G|, 1 when both are empty; F with beta^2 = 0.3 on the binary
mask, precision 1 when nothing is predicted, recall 1 when the truth is empty. AVSBench's script: with an
empty truth J is the share of pixels that are rightly empty; F is the maximum over 255 thresholds of the
mean F curve, pictures with an empty truth left out. A binary mask's curve has two values: the whole
picture's (threshold 0) and its own.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Bits = NDArray[np.bool_]
BETA2 = 0.3


def jaccard(said: Bits, truth: Bits) -> float:
    """Intersection over union; 1.0 when both masks are empty (Crab+)."""
    union = int((said | truth).sum())
    return float((said & truth).sum() / union) if union else 1.0


def _f(precision: float, recall: float) -> float:
    total = BETA2 * precision + recall
    return (1 + BETA2) * precision * recall / total if total else 0.0


def f_score(said: Bits, truth: Bits) -> float:
    """F with beta^2 = 0.3; precision of nothing said and recall of an empty truth are 1 (Crab+)."""
    hits, told, true = int((said & truth).sum()), int(said.sum()), int(truth.sum())
    return _f(hits / told if told else 1.0, hits / true if true else 1.0)


def inverse_jaccard(said: Bits, truth: Bits) -> float:
    """`jaccard`, but for an empty truth the share of pixels that aren't predicted (AVSBench)."""
    return jaccard(said, truth) if truth.any() else float((~said).mean())


def f_curve(said: Bits, truth: Bits) -> tuple[float, float] | None:
    """F at threshold 0 (everything predicted) and above it; None for an empty truth (AVSBench)."""
    true = int(truth.sum())
    if not true:
        return None
    hits, told = int((said & truth).sum()), int(said.sum())
    return _f(true / truth.size, 1.0), _f(hits / told if told else 0.0, hits / true)


def s_of_null(said: Bits) -> float:
    """Ref-AVS's S for an absent object: sqrt(predicted pixels / all pixels), 0 is best (official script)."""
    return float(np.sqrt(said.mean()))


def s_of_null_crab(said: Bits) -> float:
    """S with the pixels that aren't predicted as denominator (Crab+'s code); inf for a full mask."""
    rest = int((~said).sum())
    return float(np.sqrt(said.sum() / rest)) if rest else float("inf")
