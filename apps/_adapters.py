"""What `import-adapter` and `export-adapter` print of an adapter."""

from __future__ import annotations

import json
from typing import Any

PART_NAMES = {"language_model": "decoder", "visual": "vision tower", "audio_tower": "audio tower"}


def print_report(report: Any, as_json: bool, idle_note: str) -> None:
    """One JSON object, or a few lines for people; `report` is an `AdapterReport`."""
    if as_json:
        print(json.dumps(report.as_json(), ensure_ascii=False))
        return
    kinds = ", ".join(report.dtypes)
    print(
        f"{report.path}  I-LoRA for {report.base}: {sum(report.linears.values())} linears, "
        f"{report.tensors:,} tensors, {report.parameters:,} parameters ({kinds}), rank {report.rank}, "
        f"{report.experts} experts, alpha {report.alpha:g}"
    )
    for part, count in report.linears.items():
        zero, drawn = report.zero_linears.get(part, 0), report.drawn_linears.get(part, 0)
        if drawn:
            note = f", {drawn} of them not in the adapter: written with zero experts, which do nothing"
        elif zero == count:
            note = f", all with zero experts: {idle_note}"
        else:
            note = f", {zero} of them with zero experts" if zero else ""
        print(f"  {PART_NAMES[part]}: {count} linears{note}")
