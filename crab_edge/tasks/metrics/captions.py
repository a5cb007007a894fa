"""Captions: ROUGE-L F1 of words. The reference code scores no captions; this one is for regressions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from crab_edge.results import Caption, Result
from crab_edge.tasks.metrics.base import Figure, Metric, Sample, normalised

#: Longer captions are cut here: the longest common subsequence takes quadratic time.
_MOST_WORDS = 200
_MOST_CANDIDATES = 50


def _words(results: Sequence[Result]) -> list[str]:
    text = " ".join(result.text for result in results if isinstance(result, Caption))
    return normalised(text).split()[:_MOST_WORDS]


def rouge_l(said: Sequence[str], truth: Sequence[str]) -> float:
    """F1 of the longest common subsequence of words, 0..1."""
    if not said or not truth:
        return 0.0
    lengths = [0] * (len(truth) + 1)
    for word in said:
        diagonal = 0
        for j, other in enumerate(truth, 1):
            above = lengths[j]
            lengths[j] = diagonal + 1 if word == other else max(above, lengths[j - 1])
            diagonal = above
    return 2 * lengths[-1] / (len(said) + len(truth))


def _score(sample: Sample) -> float:
    return rouge_l(_words(sample.predicted), _words(sample.truth))


def _figures(samples: Sequence[Sample]) -> list[Figure]:
    truths = [_words(sample.truth) for sample in samples]
    counts = Counter(" ".join(words) for words in truths)
    # The most frequent captions stand for all: trying each against each is quadratic.
    tried = [text.split() for text, _ in counts.most_common(_MOST_CANDIDATES)]
    probe = truths[:200]
    constant = max(tried, key=lambda words: sum(rouge_l(words, truth) for truth in probe))
    value = 100 * sum(map(_score, samples)) / len(samples)
    baseline = 100 * sum(rouge_l(constant, truth) for truth in truths) / len(truths)
    shown = " ".join(constant)
    named = f"best constant caption ({shown[:60]}{'...' if len(shown) > 60 else ''})"
    return [Figure("ROUGE-L F1", value, len(samples), baseline, named, len(counts))]


METRICS = (Metric("caption", _figures, _score, "ROUGE-L F1"),)
