"""What holding answers to their form costs for each token: its choice with and without, no model run."""

from __future__ import annotations

import dataclasses
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

#: Far from the token limit, as answers mostly are.
_REMAINING = 512


def measure(bundle: Path | None, tokens: int = 100) -> dict[str, Any]:
    """Seconds for choosing a token over random logits: plain argmax, free text and tagged part of each task.

    `tagged_s` is the median and `longest_s` the longest of `tokens` choices in the tagged part; `free_s` the
    median in the free text before it, None for tasks without. `compile_s` is spent once for a bundle and
    task, `ready_s` once for a bundle. DependencyError without llguidance.
    """
    from crab_edge import tasks
    from crab_edge.bundle import Bundle, default_bundle
    from crab_edge.grammar import Grammars

    found = default_bundle() if bundle is None else bundle
    opened = found if isinstance(found, Bundle) else Bundle.open(found)
    vocabulary = opened.manifest.model.vocab_size
    logits = np.random.default_rng(0).standard_normal((tokens, vocabulary), np.float32)
    started = time.perf_counter()
    grammars = Grammars(opened)
    ready = time.perf_counter() - started
    rows = []
    for task in tasks.all():
        if not task.grammar.strip():
            continue
        started = time.perf_counter()
        grammars.form(task)
        compiled = time.perf_counter() - started
        tagged = _choices(grammars, dataclasses.replace(task, opens=()), logits)
        free = _choices(grammars, task, logits) if task.opens else []
        rows.append(
            {
                "task": task.name,
                "compile_s": compiled,
                "free_s": statistics.median(free) if free else None,
                "tagged_s": statistics.median(tagged),
                "longest_s": max(tagged),
            }
        )
    plain = statistics.median(_seconds(lambda row=row: int(np.argmax(row))) for row in logits)
    return {
        "bundle": str(opened.identity),
        "vocabulary": vocabulary,
        "ready_s": ready,
        "plain_s": plain,
        "tasks": rows,
    }


def _choices(grammars: Any, task: Any, logits: Any) -> list[float]:
    """Seconds of each choice, over as many answers as they take; of free text, until it ends."""
    from crab_edge.guide import guide
    from crab_edge.tasks import MODEL_CONTEXT

    seconds: list[float] = []
    steered = guide(grammars, task, MODEL_CONTEXT, _REMAINING)
    for row in logits:
        if steered.finished:
            if task.opens:
                break
            steered = guide(grammars, task, MODEL_CONTEXT, _REMAINING)
        started = time.perf_counter()
        token = steered.choose(row, _REMAINING)
        seconds.append(time.perf_counter() - started)
        if token in grammars.vocabulary.eos_ids:
            steered = guide(grammars, task, MODEL_CONTEXT, _REMAINING)
    return seconds


def _seconds(action: Any) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def show(result: dict[str, Any]) -> None:
    """The result as a few lines for the terminal."""
    print(
        f"the grammar, for each token (model left out, {result['vocabulary']} ids): without "
        f"{result['plain_s'] * 1e6:.0f} us; tokenizer read once in {result['ready_s'] * 1e3:.0f} ms"
    )
    for row in result["tasks"]:
        free = "" if row["free_s"] is None else f"free text {row['free_s'] * 1e6:.0f} us, "
        print(
            f"  {row['task']}: {free}tagged part {row['tagged_s'] * 1e6:.0f} us "
            f"(longest {row['longest_s'] * 1e6:.0f}), compiled once in {row['compile_s'] * 1e3:.0f} ms"
        )
