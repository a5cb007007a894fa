"""MUSIC-AVQA: exact match of normalised answers, by question type, by modality and overall (micro)."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from crab_edge.tasks.metrics.base import Figure, Metric, Sample, label_of, majority, normalised, percent

_YES = {"yes", "true"}
_NO = {"no", "false"}


def same_answer(text: str) -> str:
    """An answer for comparison: number words as digits, yes and no by their first word."""
    value = normalised(text)
    first = value.split(" ", 1)[0] if value else ""
    if first in _YES:
        return "yes"
    return "no" if first in _NO else value


def question_type(record: Mapping[str, Any]) -> tuple[str, str]:
    """(modality, type) of a record, lower case, whether `type` is a list, its JSON or its Python form."""
    value = record.get("type") or record.get("question_type") or ("", "")
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            value = re.findall(r"[A-Za-z][A-Za-z -]*", value)
    parts = [str(part).strip().lower() for part in (value if isinstance(value, list | tuple) else [value])]
    parts = ["audio-visual" if part in ("av", "audio visual") else part for part in parts if part]
    if len(parts) >= 2:
        return parts[0], parts[1]
    return ("other", parts[0]) if parts else ("other", "other")


def right(sample: Sample) -> float:
    """1.0 when the answers are the same."""
    truth, said = label_of(sample.truth), label_of(sample.predicted)
    return float(truth is not None and said is not None and same_answer(said) == same_answer(truth))


def _figures(samples: Sequence[Sample]) -> list[Figure]:
    types = [question_type(sample.record) for sample in samples]
    answers = [same_answer(label_of(sample.truth) or "") for sample in samples]
    by_type: dict[tuple[str, str], list[str]] = defaultdict(list)
    for kind, answer in zip(types, answers, strict=True):
        by_type[kind].append(answer)
    constant = {kind: majority(said)[0] for kind, said in by_type.items()}
    scores = [right(sample) for sample in samples]
    trivial = [float(constant[kind] == answer) for kind, answer in zip(types, answers, strict=True)]

    def figure(name: str, own: list[int]) -> Figure:
        said = sorted({constant[types[i]] for i in own})
        return Figure(
            name,
            percent(sum(scores[i] for i in own), len(own)),
            len(own),
            percent(sum(trivial[i] for i in own), len(own)),
            f"majority answer per type ({', '.join(said[:6])})",
            len({answers[i] for i in own}),
        )

    groups = {"overall": list(range(len(types)))}
    for naming in (lambda kind: kind[0], lambda kind: kind[1], " ".join):
        for name in sorted({naming(kind) for kind in types}):
            groups[name] = [i for i, kind in enumerate(types) if naming(kind) == name]
    return [figure(name, own) for name, own in groups.items()]


METRICS = (Metric("music-avqa", _figures, right, "accuracy"),)
