"""Segmentation: S4 and MS3 (AVSBench), Ref-AVS's seen, unseen and null lists. Masks are compared at 224x224.

Crab+ averages over valid answers only: those whose coordinates lie in 0..223, the box not reversed; S4 and
MS3 want at least one point and, without a box, three of them; Ref-AVS a box or a point, or the answer
false, which is an empty mask. So every figure comes twice: over valid answers, and with what gave no mask
scored as a failure (J = F = 0, S = 1). A box that reaches 224, the frame's edge, isn't valid in the first
and is scored in the second.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from crab_edge.masks import decode, resized_bits
from crab_edge.results import Box, Choice, Mask, Points, Result, Unparsed
from crab_edge.tasks.base import FRAME_SIDE
from crab_edge.tasks.metrics import mask_scores as one
from crab_edge.tasks.metrics.base import Figure, Metric, Sample, percent

Bits = NDArray[np.bool_]
_VALID, _ALL = "valid only", "invalid = 0"
#: Constant masks tried: pixels that at least this share of the truths covers.
_LEVELS = np.linspace(0.05, 0.75, 15)


def union(results: Iterable[Result]) -> Bits | None:
    """All masks of the results together, bool [224, 224]; None when there is none."""
    masks = [result for result in results if isinstance(result, Mask)]
    if not masks:
        return None
    together = np.zeros((FRAME_SIDE, FRAME_SIDE), dtype=bool)
    for mask in masks:
        together |= resized_bits(decode(mask), FRAME_SIDE, FRAME_SIDE)
    return together


def answered_absent(results: Iterable[Result]) -> bool:
    """Whether the answer says that the object isn't there."""
    return any(isinstance(result, Choice) and result.value.lower() in ("false", "no") for result in results)


def inside(results: Iterable[Result]) -> bool:
    """Crab+'s check: it all parses, coordinates are in 0..223 (the edge 224 fails), no box is reversed."""
    for result in results:
        if isinstance(result, Unparsed):
            return False
        if isinstance(result, Box) and not (
            0 <= result.x1 < result.x2 < FRAME_SIDE and 0 <= result.y1 < result.y2 < FRAME_SIDE
        ):
            return False
        points = result.xy if isinstance(result, Points) else ()
        if not all(0 <= value < FRAME_SIDE for xy in points for value in xy):
            return False
    return True


def valid_avs(results: Sequence[Result]) -> bool:
    """Crab+'s rule for S4 and MS3."""
    points = sum(len(result.xy) for result in results if isinstance(result, Points))
    boxed = any(isinstance(result, Box) for result in results)
    return inside(results) and points >= (1 if boxed else 3)


def valid_ref(results: Sequence[Result]) -> bool:
    """Crab+'s rule for Ref-AVS."""
    if answered_absent(results):
        return True
    return inside(results) and any(
        isinstance(result, Box) or (isinstance(result, Points) and result.xy) for result in results
    )


@dataclass(frozen=True)
class _Pair:
    """A prediction (None = no mask) and its truth; `valid` by the reference's rule."""

    said: Bits | None
    truth: Bits
    valid: bool


def _pair(sample: Sample, valid: Callable[[Sequence[Result]], bool]) -> _Pair:
    said = union(sample.predicted)
    if said is None and answered_absent(sample.predicted):
        said = np.zeros((FRAME_SIDE, FRAME_SIDE), dtype=bool)
    truth = union(sample.truth)
    if truth is None:
        truth = np.zeros((FRAME_SIDE, FRAME_SIDE), dtype=bool)
    # A prediction that is nothing but a mask (another model's) has no coordinates to check.
    coordinates = [result for result in sample.predicted if isinstance(result, Box | Points)]
    good = said is not None and (valid(sample.predicted) or not coordinates)
    return _Pair(said, truth, good)


def _mean(values: Sequence[float]) -> float:
    return 100 * sum(values) / len(values) if values else 0.0


def _score(pair: _Pair, measure: Callable[[Bits, Bits], float]) -> float:
    return 0.0 if pair.said is None else measure(pair.said, pair.truth)


def _best_f(pairs: Sequence[_Pair]) -> tuple[float, int]:
    """AVSBench's F over pairs whose truth isn't empty, and their number; without a mask the curve is 0."""
    curves = [(0.0, 0.0) if p.said is None else one.f_curve(p.said, p.truth) for p in pairs if p.truth.any()]
    told = [curve for curve in curves if curve is not None]
    return (100 * float(np.max(np.mean(told, axis=0))) if told else 0.0), len(told)


def best_constant_mask(truths: Sequence[Bits]) -> tuple[Bits, str]:
    """The mask with the best mean J when said of every picture, among: none, all, what many truths cover."""
    shares = np.mean(truths, axis=0)
    empty = np.zeros_like(truths[0])
    tried = [(empty, "empty"), (~empty, "whole frame")]
    tried += [(shares >= level, f"pixels in {100 * level:.0f} % of the truths") for level in _LEVELS]
    return max(tried, key=lambda item: sum(one.jaccard(item[0], truth) for truth in truths))


def _region_figures(pairs: Sequence[_Pair], prefix: str = "", *, official: bool) -> list[Figure]:
    """J and F of valid answers and of all; with `official` AVSBench's own figures as well."""
    constant, name = best_constant_mask([pair.truth for pair in pairs])
    trivial = [_Pair(constant, pair.truth, True) for pair in pairs]
    named = f"best constant mask ({name})"
    figures = []
    for convention in ("", "AVSBench ") if official else ("",):
        for counted in (_VALID, _ALL):
            own = [pair for pair in pairs if pair.valid or counted == _ALL]
            at = (own, trivial)
            if convention:
                j, j0 = (_mean([_score(p, one.inverse_jaccard) for p in part]) for part in at)
                (f, n), (f0, _) = (_best_f(part) for part in at)
                names = ("mIoU", "F-max")
            else:
                j, j0 = (_mean([_score(p, one.jaccard) for p in part]) for part in at)
                f, f0 = (_mean([_score(p, one.f_score) for p in part]) for part in at)
                n, names = len(own), ("J", "F")
            label = [f"{prefix}{convention}{name} ({counted})" for name in names]
            figures.append(Figure(label[0], j, len(own), j0, named))
            figures.append(Figure(label[1], f, n, f0, named))
    return figures


def _avs_figures(samples: Sequence[Sample]) -> list[Figure]:
    pairs = [_pair(sample, valid_avs) for sample in samples]
    share = percent(sum(pair.valid for pair in pairs), len(pairs))
    return [*_region_figures(pairs, official=True), Figure("valid answers", share, len(pairs))]


def ref_split(sample: Sample) -> str:
    """ "seen", "unseen" or "null" by the record's `split` (test_s, test_u, test_n), else by the truth."""
    name = str(sample.record.get("split", "")).lower().removeprefix("test").strip("_- ")
    for split in ("seen", "unseen", "null"):
        if name in (split, split[0]):
            return split
    truth = union(sample.truth)
    return "seen" if truth is not None and truth.any() else "null"


def _ref_figures(samples: Sequence[Sample]) -> list[Figure]:
    groups: dict[str, list[_Pair]] = {"seen": [], "unseen": [], "null": []}
    for sample in samples:
        groups[ref_split(sample)].append(_pair(sample, valid_ref))
    figures = []
    for name in ("seen", "unseen"):
        if groups[name]:
            figures += _region_figures(groups[name], f"{name} ", official=False)
    if groups["seen"] and groups["unseen"]:
        figures += _region_figures(groups["seen"] + groups["unseen"], "seen + unseen ", official=False)
    if groups["null"]:
        figures += _null_figures(groups["null"])
    every = [pair for part in groups.values() for pair in part]
    share = percent(sum(pair.valid for pair in every), len(every))
    return [*figures, Figure("valid answers", share, len(every))]


def _null_figures(pairs: Sequence[_Pair]) -> list[Figure]:
    """S, for which lower is better; always answering false has S = 0."""
    told = [pair.said for pair in pairs if pair.valid and pair.said is not None]
    every = [1.0 if pair.said is None else one.s_of_null(pair.said) for pair in pairs]
    crab = [value for said in told if np.isfinite(value := one.s_of_null_crab(said))]

    def figure(name: str, values: list[float]) -> Figure:
        mean = sum(values) / len(values) if values else 0.0
        return Figure(f"null S, lower is better ({name})", mean, len(values), 0.0, "answer false", unit="")

    return [
        figure(_VALID, [one.s_of_null(said) for said in told]),
        figure("invalid = 1", every),
        figure("valid only, Crab+'s denominator", crab),
    ]


def _avs_score(sample: Sample) -> float:
    return _score(_pair(sample, valid_avs), one.jaccard)


def _ref_score(sample: Sample) -> float:
    pair = _pair(sample, valid_ref)
    if ref_split(sample) == "null":
        return 0.0 if pair.said is None else 1.0 - one.s_of_null(pair.said)
    return _score(pair, one.jaccard)


METRICS = (
    Metric("avs", _avs_figures, _avs_score, "J, invalid = 0", needs_masks=True),
    Metric("ref-avs", _ref_figures, _ref_score, "J, or 1 - S of an absent object", needs_masks=True),
)
