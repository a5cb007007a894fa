"""What I-LoRA's cost has to reach, read off a comparison's rows."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

#: The bars were set for this class of decoder; on others they are shown, and miss or hold for other reasons.
CLASS = "1.5b"
TIME_OVER_BYTES = 1.06
BANDWIDTH_POINTS = -0.03
LLAMA_DECODE, LLAMA_PREFILL, LLAMA_BLOCK = 1.05, 1.25, 128
TORCH_DECODE = 10.0


def bars(rows: Sequence[dict[str, Any]], *, block: int) -> list[dict[str, Any]]:
    """Each bar as {bar, variant, value, limit, at_least, spread, met}.

    `limit` and `met` are None where the bar doesn't hold for this block. The other runtimes are compared with
    the first form of I-LoRA, whose bytes the LoRA was matched to.
    """
    from crab_edge_apps._bench_compare import BASE, BUNDLE, LLAMA_LORA, TORCH

    named = {row["variant"]: row for row in rows}
    base = named[BASE]
    ours = [
        row for row in rows if row.get("runtime") == "onnxruntime" and row["variant"] not in (BASE, BUNDLE)
    ]
    found = []
    for row in ours:
        found.append(
            _bar(
                "decode time over the ratio of bytes",
                row,
                [ratio / row["byte_ratio"] for ratio in _ratios(row, base, "decode_s")],
                TIME_OVER_BYTES,
                at_least=False,
            )
        )
        share = row["bandwidth_share"] - base["bandwidth_share"]
        found.append(
            _bar("share of bandwidth beside the base", row, [share], BANDWIDTH_POINTS, at_least=True)
        )
    if ours and LLAMA_LORA in named:
        for part, limit in (("decode_s", LLAMA_DECODE), ("prefill_s", LLAMA_PREFILL)):
            found.append(
                _bar(
                    f"{part[:-2]} speed against llama.cpp with a byte-matched LoRA",
                    ours[0],
                    _ratios(named[LLAMA_LORA], ours[0], part),
                    limit if block == LLAMA_BLOCK else None,
                    at_least=True,
                )
            )
    if ours and TORCH in named:
        values = _ratios(named[TORCH], ours[0], "decode_s")
        found.append(_bar("decode speed against torch bf16", ours[0], values, TORCH_DECODE, at_least=True))
    return found


def _ratios(row: dict[str, Any], under: dict[str, Any], part: str) -> list[float]:
    """Round by round, `row`'s seconds over `under`'s."""
    return [run[part] / other[part] for run, other in zip(row["runs"], under["runs"], strict=True)]


def _bar(
    name: str, row: dict[str, Any], values: list[float], limit: float | None, *, at_least: bool
) -> dict[str, Any]:
    value = statistics.median(values)
    met = None if limit is None else (value >= limit if at_least else value <= limit)
    return {
        "bar": name,
        "variant": row["variant"],
        "value": value,
        "spread": [min(values), max(values)],
        "limit": limit,
        "at_least": at_least,
        "met": met,
    }


def show(result: dict[str, Any]) -> None:
    """The comparison as tables for the terminal."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console = Console(width=150)
    table = Table(
        title=(
            f"{result['shape']}: w{result['bits']}, block {result['block']}, level "
            f"{result['accuracy_level']}, {result['threads']} threads, context {result['context']}, prefill "
            f"{result['prefill']}; medians of {result['rounds']} interleaved rounds"
        )
    )
    for column in (
        "",
        "MB / token",
        "nodes",
        "decode tok/s",
        "prefill tok/s",
        "bytes",
        "decode time",
        "prefill time",
        "GB/s",
        "of read bandwidth",
        "peak MB",
    ):
        table.add_column(column, justify="right" if column else "left")
    for row in result["rows"]:
        low, high = row["decode_time_ratio_spread"]
        name = row["variant"]
        if "lora_rank" in row:
            name += f" (mean rank {row['lora_rank']:.0f}, {row['lora_type']})"
        table.add_row(
            name,
            f"{row['weight_bytes'] / 1e6:.1f}",
            str(row.get("nodes", "")),
            f"{row['decode_tokens_per_s']:.1f}",
            f"{row['prefill_tokens_per_s']:.0f}",
            f"{row['byte_ratio']:.3f}x",
            f"{row['decode_time_ratio']:.3f}x ({low:.2f} to {high:.2f})",
            f"{row['prefill_time_ratio']:.3f}x",
            f"{row['gigabytes_per_s']:.1f}",
            f"{row['bandwidth_share']:.0%}",
            f"{row['peak_bytes'] / 1e6:.0f}",
        )
    console.print(table)
    host, (slowest, fastest) = result["machine"], result["read_gigabytes_per_s_spread"]
    console.print(
        f"{host['cpu']}, {host['usable_cores']} cores, governor {host['governor'] or 'unreadable'}, load "
        f"{host['load_before']:.1f}; memory read {fastest:.1f} GB/s (slowest round {slowest:.1f}); "
        + ", ".join(f"{name} {version}" for name, version in host["versions"].items()),
        highlight=False,
    )
    for name, why in result["skipped"].items():
        console.print(f"not run: {name}: {why}", highlight=False)
    if result["plain_linears"]:
        console.print(f"{result['plain_linears']} of the bundle's linears carry no adapter", highlight=False)
    for bar in result["bars"]:
        low, high = bar["spread"]
        sign = ">=" if bar["at_least"] else "<="
        if bar["limit"] is None:
            verdict = f"no bar at block {result['block']}"
        else:
            verdict = f"bar {sign} {bar['limit']:g}: {'met' if bar['met'] else 'MISSED'}"
        console.print(
            f"{bar['variant']}: {bar['bar']} {bar['value']:.3f} ({low:.2f} to {high:.2f}), {verdict}",
            highlight=False,
        )
