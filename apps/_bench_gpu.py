"""`crab-edge bench --gpu`: the official formula, eager and compiled, against the torch engine's kernels.

Every contender is compared with a float32 reference before it is timed, on the very calls that are timed: one
that is wrong is reported as wrong and gets no time. All contenders of a shape stay in memory and take turns.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crab_edge_apps import _bench_gpu_bars as judging
from crab_edge_apps import _bench_gpu_timing as timing
from crab_edge_apps._bench_gpu_card import Card, Copier, facts, open_card

from crab_edge.errors import CheckError, CrabError, InputError
from crab_edge.shape import KNOWN, ModelShape

if TYPE_CHECKING:
    from crab_edge_apps._bench_gpu_contenders import Entry

FORMS = ("residual4x2", "unfolded8", "plane4")
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Settings:
    """How the comparison is run. context, prefill: tokens; block None: 128 where the widths allow it."""

    forms: tuple[str, ...] = FORMS[:2]
    block: int | None = None
    context: int = 1024
    prefill: int = 650
    rounds: int = 5
    seed: int = 0


def settings(
    device: str,
    rounds: int,
    *,
    forms: tuple[str, ...] = (),
    block: int | None = None,
    context: int | None = None,
    prefill: int | None = None,
) -> Settings:
    """The settings with defaults filled in: a dry run on the CPU takes few tokens and one round.

    InputError for a form that doesn't exist.
    """
    forms = tuple(dict.fromkeys(FORMS[0] if form == "auto" else form for form in forms)) or FORMS[:2]
    unknown = [form for form in forms if form not in FORMS]
    if unknown:
        raise InputError(f"--experts {unknown[0]}: expected auto, {', '.join(FORMS)}")
    if device == "cpu":
        context, prefill, rounds = context or 12, prefill or 5, min(rounds, 2)
    default = Settings()
    return Settings(forms, block, context or default.context, prefill or default.prefill, rounds)


def command(
    names: Sequence[str],
    settings: Settings,
    device: str,
    *,
    bundle: Path | None = None,
    as_json: bool = False,
    check: bool = False,
    plot: Path | None = None,
) -> None:
    """Runs and prints it: random decoders of the shapes `names`, and all engines on `bundle`.

    CheckError when `check` and a bar is missed; CrabError for a wrong contender.
    """
    from rich.console import Console
    from rich.progress import Progress as Bar

    _known(names)
    card = open_card(device)
    from crab_edge_apps._bench_gpu_weights import random_model

    # Refused before anything is made.
    for name in names:
        for form in settings.forms:
            random_model(KNOWN[name], form, card.device, block=settings.block)
    opened = None
    if bundle is not None:
        from crab_edge.bundle import Bundle

        opened = Bundle.open(bundle)
    with Bar(transient=True, console=Console(stderr=True)) as bar:
        task = bar.add_task("starting")

        def progress(doing: str, done: int, of: int) -> None:
            bar.update(task, description=doing, completed=done, total=of)

        result = measure([KNOWN[name] for name in names], list(names), settings, card, progress)
        if opened is not None:
            from crab_edge_apps import _bench_gpu_engines

            sizes = {key: getattr(settings, key) for key in ("rounds", "context", "prefill")}
            result["engines"] = _bench_gpu_engines.measure(opened, card, **sizes, progress=progress)
    if as_json:
        print(json.dumps(result))
    else:
        show(result)
    if plot is not None:
        judging.plot(result, plot)
    wrong = [
        f"{shape['shape']}: {name}: {why}"
        for shape in result["shapes"]
        for name, why in shape["wrong"].items()
    ]
    wrong += [f"engine {name}: {why}" for name, why in result.get("engines", {}).get("wrong", {}).items()]
    if wrong:
        raise CrabError(f"bench --gpu: {'; '.join(wrong)}")
    missed = [bar for shape in result["shapes"] for bar in shape["bars"] if bar["met"] is False]
    if check and missed:
        raise CheckError(f"bench --gpu: {'; '.join(map(judging.described, missed))}")


def tiles_command(names: Sequence[str], settings: Settings, device: str, *, as_json: bool = False) -> None:
    """Tries other tiles for the decode kernels of random decoders; prints what was found.

    InputError for a shape that doesn't exist or doesn't suit, several forms of experts, and the CPU, where no
    kernel is launched.
    """
    from rich.console import Console
    from rich.progress import Progress as Bar

    _known(names)
    card = open_card(device)
    if not card.real:
        raise InputError("--tiles needs a GPU: on a CPU no kernel is launched")
    from crab_edge_apps import _bench_gpu_tiles
    from crab_edge_apps._bench_gpu_weights import random_model

    form = settings.forms[0]
    models = [
        random_model(KNOWN[name], form, card.device, block=settings.block, seed=settings.seed)
        for name in names
    ]
    copier = Copier(card)
    copy = timing.Timed("copy", copier)
    timing.measure([copy], settings.rounds, card)
    bandwidth = max(copier.moved_bytes / seconds for seconds in copy.seconds)
    result: dict[str, Any] = {"card": facts(card), "copy_gigabytes_per_s": bandwidth / 1e9, "shapes": []}
    with Bar(transient=True, console=Console(stderr=True)) as bar:
        task = bar.add_task("starting")
        for name, model in zip(names, models, strict=True):

            def progress(doing: str, done: int, of: int, name: str = name) -> None:
                bar.update(task, description=f"{name}: {doing}", completed=done, total=of)

            parts = _bench_gpu_tiles.sweep(model, card, settings.rounds, progress=progress)
            result["shapes"].append(
                {"shape": name, "form": form, "block": model.recipe.block, "parts": parts}
            )
    if as_json:
        print(json.dumps(result))
    else:
        _bench_gpu_tiles.show(result)


def _known(names: Sequence[str]) -> None:
    unknown = [name for name in names if name not in KNOWN]
    if unknown:
        raise InputError(f"--shape {unknown[0]}: with --gpu expected one of {', '.join(KNOWN)}")


def show(result: dict[str, Any]) -> None:
    """All tables of a result."""
    judging.show(result)
    if "engines" in result:
        from crab_edge_apps import _bench_gpu_engines

        _bench_gpu_engines.show(result["engines"])


def measure(
    shapes: Sequence[ModelShape],
    names: Sequence[str],
    settings: Settings,
    card: Card,
    progress: Progress = lambda what, done, of: None,
) -> dict[str, Any]:
    """All shapes, one after the other, as plain JSON values: `card`, `shapes` with `rows`, `skipped`, `wrong`
    and `bars`, and the copy's bandwidth over all rounds of all shapes.
    """
    result = {
        "card": facts(card),
        **{key: value for key, value in asdict(settings).items() if key not in ("forms", "block")},
        "shapes": [],
    }
    if shapes:
        copier = Copier(card)
        copies: list[float] = []
        for shape, name in zip(shapes, names, strict=True):
            result["shapes"].append(_shape(shape, name, settings, card, copier, copies, progress))
        result["copy_gigabytes_per_s"] = max(copies) / 1e9
        result["copy_gigabytes_per_s_spread"] = [min(copies) / 1e9, max(copies) / 1e9]
    return result


def _shape(
    shape: ModelShape,
    name: str,
    settings: Settings,
    card: Card,
    copier: Copier,
    copies: list[float],
    progress: Progress,
) -> dict[str, Any]:
    import torch
    from crab_edge_apps._bench_gpu_contenders import Field, contenders, entries, release
    from crab_edge_apps._bench_gpu_parts import Inputs
    from crab_edge_apps._bench_gpu_weights import random_model

    # What was compiled for the shape before counts against the compiler's limit on variants.
    torch.compiler.reset()
    release(card)
    models = [
        random_model(shape, form, card.device, block=settings.block, seed=settings.seed)
        for form in settings.forms
    ]
    bare = random_model(shape, None, card.device, block=models[0].recipe.block, seed=settings.seed)
    inputs = Inputs(bare, torch.bfloat16, settings.context, settings.prefill)
    field = Field(inputs, card, lambda what, done, of: progress(f"{name}: {what}", done, of), {}, {})
    with torch.inference_mode():
        found = entries(contenders(models, bare, field), field)
    inputs.forget()
    copy = timing.Timed("copy", copier)
    timing.measure(
        [copy, *(entry.timed for entry in found)],
        settings.rounds,
        card,
        field.progress,
    )
    copies += [copier.moved_bytes / seconds for seconds in copy.seconds]
    bandwidth = max(copier.moved_bytes / seconds for seconds in copy.seconds)
    rows = [_row(entry, bandwidth, card) for entry in found]
    rows.sort(key=lambda row: _ORDER.index(row["part"]))
    return {
        "shape": name,
        "sizes": {
            key: getattr(shape, key)
            for key in ("hidden", "intermediate", "layers", "heads", "kv_heads", "head_dim", "vocab")
        }
        | {"rank": bare.rank, "experts": bare.n_experts},
        "block": bare.recipe.block,
        "forms": list(settings.forms),
        "rows": rows,
        "skipped": field.skipped,
        "wrong": field.wrong,
        "bars": judging.bars(rows, settings.forms[0], name if card.real else "dry run"),
    }


_GROUPS = ("qkv", "o", "gate_up", "down")
_ORDER = (
    *(f"{group}{part}" for group in _GROUPS for part in ("", " product", " route")),
    "layer decode",
    "decode",
    "layer prefill",
    "prefill",
)


def _row(entry: Entry, copy: float, card: Card) -> dict[str, Any]:
    part, timed = entry.part, entry.timed
    return judging.row(
        part.name,
        timed.name,
        [seconds / part.per for seconds in timed.seconds],
        part.bytes,
        copy,
        error=entry.error,
        calls=timed.calls,
        in_cache=card.may_cache(part.bytes * part.per),
        over_base=None if entry.base is None else judging.over_base(entry, entry.base),
    )


if __name__ == "__main__":
    # The tables of a result that was saved with --json.
    show(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
