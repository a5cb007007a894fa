"""What the GPU benchmark's rows add up to: ratios round by round, bars, tables, the plot."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crab_edge.errors import DependencyError

if TYPE_CHECKING:
    from crab_edge_apps._bench_gpu_contenders import Entry
    from rich.console import Console

OFFICIAL_EAGER = "official bf16, eager"
OFFICIAL_GRAPH = "official bf16, compiled, CUDA graph"
BASE_EAGER = "no adapters, torch engine, eager"
BASE = "no adapters, torch engine, CUDA graph"

#: The bars were set for this decoder on an H100 SXM; on other cards they are shown and judged all the same.
SHAPE = "7b"
OVER_EAGER, OVER_COMPILED = 8.0, 2.0
PRODUCT_SHARE, STEP_SHARE = 0.70, 0.50
TIME_OVER_BYTES = 0.05
PARTS = ("decode", "prefill")


def engine(form: str | None) -> tuple[str, str]:
    """The torch engine on experts stored as `form`, without and with a CUDA graph."""
    return f"{form}, torch engine, eager", f"{form}, torch engine, CUDA graph"


def compiled(form: str | None) -> str:
    """The engine's kernels in the official decoder's other parts, compiled."""
    return f"{form}, kernels compiled in, CUDA graph"


def row(
    part: str, contender: str, rounds: Sequence[float], bytes_read: int, copy: float, **facts: Any
) -> dict[str, Any]:
    """One line of a table. rounds: seconds; copy: the card's bytes per second in a copy."""
    seconds = statistics.median(rounds)
    return {
        "part": part,
        "contender": contender,
        "seconds": seconds,
        "spread": [min(rounds), max(rounds)],
        "rounds": list(rounds),
        "bytes": bytes_read,
        "gigabytes_per_s": bytes_read / seconds / 1e9,
        "copy_share": bytes_read / seconds / copy,
        **facts,
    }


def over_base(entry: Entry, base: Entry) -> dict[str, Any]:
    """What the adapters cost: time and bytes over those of the same part without them, round by round."""
    times = ratios(entry.timed.seconds, base.timed.seconds)
    return {
        "time": statistics.median(times),
        "spread": [min(times), max(times)],
        "bytes": entry.part.bytes / base.part.bytes,
    }


def ratios(over: Sequence[float], under: Sequence[float]) -> list[float]:
    """Round by round, one contender's seconds over another's."""
    return [a / b for a, b in zip(over, under, strict=True)]


def bars(rows: Sequence[Mapping[str, Any]], form: str, shape: str) -> list[dict[str, Any]]:
    """Each bar as {bar, part, value, spread, limit, at_least, met}; `limit`, `met` are None for other shapes.

    form: how the experts of the contender that is judged are stored. A bar whose contenders weren't measured
    has value None and isn't met.
    """
    named = {(row["part"], row["contender"]): row for row in rows}
    judged = shape == SHAPE
    mine = engine(form)[1]
    found = []

    def add(
        name: str, part: str, values: Sequence[float] | None, limit: float, at_least: bool = True
    ) -> None:
        value = statistics.median(values) if values else None
        met = None
        if judged:
            met = value is not None and (value >= limit if at_least else value <= limit)
        found.append(
            {
                "bar": name,
                "part": part,
                "value": value,
                "spread": [min(values), max(values)] if values else None,
                "limit": limit if judged else None,
                "at_least": at_least,
                "met": met,
            }
        )

    step = named.get(("decode", mine))
    for other, limit in ((OFFICIAL_EAGER, OVER_EAGER), (OFFICIAL_GRAPH, OVER_COMPILED)):
        rival = named.get(("decode", other))
        both = step is not None and rival is not None
        add(
            f"speed against {other}",
            "decode",
            ratios(rival["rounds"], step["rounds"]) if both else None,
            limit,
        )  # type: ignore[index]
    for part in ("gate_up", "down"):
        product = named.get((f"{part} product", mine))
        shares = None
        if product is not None:
            shares = [product["copy_share"] * product["seconds"] / seconds for seconds in product["rounds"]]
        add("share of copy bandwidth", f"{part} product", shares, PRODUCT_SHARE)
    shares = None
    if step is not None:
        shares = [step["copy_share"] * step["seconds"] / seconds for seconds in step["rounds"]]
    add("share of copy bandwidth", "decode", shares, STEP_SHARE)
    base = named.get(("decode", BASE))
    more = None
    if step is not None and base is not None:
        of_bytes = step["over_base"]["bytes"]
        more = [time - of_bytes for time in ratios(step["rounds"], base["rounds"])]
    add("adapters' time over the ratio of bytes", "decode", more, TIME_OVER_BYTES, at_least=False)
    return found


def described(bar: Mapping[str, Any]) -> str:
    """A bar in one line."""
    sign = ">=" if bar["at_least"] else "<="
    value = "not measured"
    if bar["value"] is not None:
        low, high = bar["spread"]
        value = f"{bar['value']:.3f} ({low:.3f} to {high:.3f})"
    verdict = (
        f"bar {sign} {bar['limit']:g}: {'met' if bar['met'] else 'MISSED'}" if bar["limit"] else "no bar"
    )
    return f"{bar['part']}, {bar['bar']}: {value}, {verdict}"


def console() -> Console:
    """Standard output; wide enough for the tables where it is no terminal."""
    from rich.console import Console

    found = Console(highlight=False)
    return found if found.is_terminal else Console(highlight=False, width=150)


def show(result: Mapping[str, Any]) -> None:
    """Everything that was measured, as tables for the terminal."""
    from rich.table import Table

    out = console()
    card = result["card"]
    warning = "" if card["real"] else " (cpu, figures mean nothing)"
    copied = ""
    if "copy_gigabytes_per_s" in result:
        low, high = result["copy_gigabytes_per_s_spread"]
        copied = f"copy {high:.0f} GB/s (slowest round {low:.0f}); "
    out.print(
        f"{card['name']}{warning}, compute capability {card.get('compute_capability', 'none')}, driver "
        f"{card.get('driver_version', 'unread')}; {copied}"
        + ", ".join(f"{name} {version}" for name, version in card["versions"].items() if version)
    )
    for shape in result["shapes"]:
        table = Table(
            title=f"{shape['shape']}{warning}: 4 bits, block {shape['block']}, prefill {result['prefill']}, "
            f"decode at {result['context']}; medians of {result['rounds']} interleaved rounds"
        )
        for column in (
            "",
            "",
            "us",
            "spread",
            "MB",
            "GB/s",
            "of copy",
            "time / base",
            "bytes / base",
            "error",
        ):
            table.add_column(column, justify="right" if column else "left")
        last = ""
        for entry in shape["rows"]:
            if entry["part"] != last and last:
                table.add_section()
            over = entry.get("over_base")
            low, high = entry["spread"]
            cached = "*" if entry.get("in_cache") else ""
            table.add_row(
                entry["part"] if entry["part"] != last else "",
                entry["contender"],
                f"{1e6 * entry['seconds']:.1f}",
                f"{1e6 * low:.1f} to {1e6 * high:.1f}",
                f"{entry['bytes'] / 1e6:.1f}",
                f"{entry['gigabytes_per_s']:.1f}{cached}",
                f"{entry['copy_share']:.0%}{cached}",
                f"{over['time']:.3f}x" if over else "",
                f"{over['bytes']:.3f}x" if over else "",
                f"{entry['error']:.1e}" if entry.get("error") is not None else "",
            )
            last = entry["part"]
        out.print(table)
        if any(entry.get("in_cache") for entry in shape["rows"]):
            out.print("* the bytes of all layers fit into the card's L2: not a memory bandwidth")
        for name, why in shape["skipped"].items():
            out.print(f"not run: {name}: {why}")
        for name, why in shape["wrong"].items():
            out.print(f"WRONG, not timed: {name}: {why}")
        for bar in shape["bars"]:
            out.print(described(bar))


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Share of copy bandwidth by part and contender, one panel a shape, as a PNG. DependencyError without
    matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise DependencyError(
            "--plot needs matplotlib, which isn't installed; run `pip install matplotlib`"
        ) from None
    shapes = result["shapes"]
    figure = Figure(figsize=(10, 4.5 * len(shapes)), layout="constrained")
    for axes, shape in zip(figure.subplots(len(shapes), squeeze=False)[:, 0], shapes, strict=True):
        # A prefill's products are bound by arithmetic: their bytes per second say little.
        rows = [entry for entry in shape["rows"] if "prefill" not in entry["part"]]
        parts = list(dict.fromkeys(entry["part"] for entry in rows))
        contenders = list(dict.fromkeys(entry["contender"] for entry in rows))
        width = 0.8 / len(contenders)
        for i, contender in enumerate(contenders):
            shares = {entry["part"]: entry["copy_share"] for entry in rows if entry["contender"] == contender}
            at = [
                j + width * (i - (len(contenders) - 1) / 2) for j, part in enumerate(parts) if part in shares
            ]
            axes.bar(at, list(shares.values()), width, label=contender)
        axes.set_xticks(range(len(parts)), parts)
        axes.set_ylabel("bytes per second / copy's")
        warning = "" if result["card"]["real"] else " (cpu, figures mean nothing)"
        axes.set_title(f"{shape['shape']} on {result['card']['name']}{warning}")
        axes.axhline(1, color="0.6", linewidth=0.8)
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)
