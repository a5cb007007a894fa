"""What runs here and how fast: engine, bundle, precision, tokens/s, memory, time to the first token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from crab_edge_apps.demo import markup
from crab_edge_apps.demo.texts import say
from crab_edge_apps.demo.turns import Turn

from crab_edge.memory import peak_bytes, resident_bytes

if TYPE_CHECKING:
    from crab_edge.session import Model


def panel(model: Model, turns: Sequence[Turn], language: str) -> str:
    """The card's content."""
    described = model.engine.describe()
    details = [f"{described[key]}" for key in ("provider", "version") if described.get(key)]
    if described.get("threads"):
        details.append(say(language, "threads", n=described["threads"]))
    recipe = model.bundle.manifest.recipe
    precision = say(
        language,
        "precision_value",
        bits=recipe.bits,
        block=recipe.block,
        adapter=recipe.adapter_bits,
        tower=recipe.tower_bits,
        kv=recipe.kv_dtype,
    )
    now, peak = memory_mb()
    rows = [
        ("engine", str(described["name"]), " · ".join(details)),
        ("bundle", model.bundle.manifest.model.name, model.bundle.identity.partition("/")[2]),
        ("precision", recipe.name, precision),
        ("tokens_s", *_speed(turns, language)),
        ("memory", say(language, "memory_value", now=f"{now:.0f}", peak=f"{peak:.0f}"), ""),
        ("ttft", *_first_token(turns, language)),
    ]
    shown = "".join(
        f"<div><dt>{markup.text(say(language, key))}</dt><dd><b>{markup.text(value)}</b>"
        f"{f'<span>{markup.text(more)}</span>' if more else ''}</dd></div>"
        for key, value, more in rows
    )
    return f'{markup.heading(say(language, "machine"))}<dl class="ce-panel">{shown}</dl>'


def _speed(turns: Sequence[Turn], language: str) -> tuple[str, str]:
    """Of the last turn that generated anything."""
    for turn in reversed(turns):
        tokens = sum(answer.timings.tokens for answer in turn.answers)
        spent = sum(answer.timings.generate_s for answer in turn.answers)
        if tokens and spent > 0:
            return f"{tokens / spent:.0f}", ""
    return "–", say(language, "none_yet")


def _first_token(turns: Sequence[Turn], language: str) -> tuple[str, str]:
    """The first question's time, and the last follow-up's that reused its prefix, as a share of it."""
    first, follow = first_and_next(turns)
    if first is None:
        # The prefix may still be there from an earlier visit of the same clip.
        value = "–" if follow is None else f"{markup.seconds(follow)} {say(language, 'ttft_next')}"
        return value, say(language, "none_asked") if follow is None else ""
    value = f"{markup.seconds(first)} {say(language, 'ttft_first')}"
    if follow is None:
        return value, ""
    share = say(language, "ttft_share", p=f"{100 * follow / first:.0f}")
    return value, f"{markup.seconds(follow)} {say(language, 'ttft_next')}: {share}"


def first_and_next(turns: Sequence[Turn]) -> tuple[float | None, float | None]:
    """Seconds to the first token of the first question that read the clip, and of the last that reused it."""
    timed = [turn for turn in turns if turn.first_token_s is not None]
    first = next((turn.first_token_s for turn in timed if not turn.reused), None)
    follow = next((turn.first_token_s for turn in reversed(timed) if turn.reused), None)
    return first, follow


def memory_mb() -> tuple[float, float]:
    """Resident memory of this process in MB: now and at most; 0 where it can't be measured."""
    now, peak = resident_bytes() or 0, peak_bytes() or 0
    return now / 1e6, max(now, peak) / 1e6
