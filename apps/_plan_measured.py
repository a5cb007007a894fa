"""The plan against what a fresh process really had resident."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from crab_edge.plan import Wish
    from crab_edge.shape import ModelShape
    from crab_edge.sizes import WeightRecipe

TOLERANCE = 0.10
TASK, FRAMES = "ave", 10
_WORKER = """
import json, sys
import crab_edge
from crab_edge import engines
from crab_edge.bundle import Bundle, sample_clip
from crab_edge.memory import peak_bytes
bundle = Bundle.open(sys.argv[1])
engine = engines.create("onnxruntime", bundle, low_memory=sys.argv[2] == "low")
media = sys.argv[4] or sample_clip()
session = crab_edge.load(bundle, engine).open(media, max_minutes=None)
options = json.loads(sys.argv[5])
answer = session.ask(task=sys.argv[3], max_new_tokens=16, grammar=False, **options)
spent = answer.timings
record = {"peak": peak_bytes(), "prompt": spent.prompt_tokens, "answer": spent.tokens}
print(json.dumps(record | {"seconds": session.clip.duration_s}))
"""


def command(path: Path, shape: ModelShape, recipe: WeightRecipe, wish: Wish, as_json: bool) -> int:
    """Asks the bundle `path` about the packaged clip, both ways of keeping encoders; 3 past the tolerance."""
    rows = [compare(path, shape, recipe, replace(wish, low_memory=low)) for low in (False, True)]
    if as_json:
        print(json.dumps(rows))
    else:
        for row in rows:
            kept = "encoders closed" if row["low_memory"] else "encoders kept"
            print(
                f"{shape.name}, {kept}: predicted {row['predicted'] / 1e6:.0f} MB, measured "
                f"{row['measured'] / 1e6:.0f} MB ({row['error']:+.1%}), {row['tokens']} tokens of prompt "
                f"(predicted {row['predicted_tokens']})"
            )
    return 3 if any(abs(row["error"]) > TOLERANCE for row in rows) else 0


def compare(path: Path, shape: ModelShape, recipe: WeightRecipe, wish: Wish) -> dict[str, Any]:
    """Predicted and measured peak of one `ask`."""
    from crab_edge.plan import plan

    found = run(path, wish.low_memory)
    wish = replace(wish, seconds=found["seconds"], frames=FRAMES, window_s=10.0, answer=found["answer"])
    predicted = plan(shape, recipe, wish)
    return {
        "low_memory": wish.low_memory,
        "predicted": predicted.peak,
        "measured": found["peak"],
        "error": predicted.peak / found["peak"] - 1,
        "tokens": found["prompt"],
        "predicted_tokens": predicted.tokens["prompt"],
        "memory": predicted.memory,
    }


def run(
    path: Path, low_memory: bool, media: str = "", options: dict[str, Any] | None = None
) -> dict[str, Any]:
    """One `ask` in a process of its own: its peak in bytes, and its tokens."""
    from crab_edge.errors import EngineError

    how = "low" if low_memory else "kept"
    arguments = [sys.executable, "-c", _WORKER, str(path), how, TASK, media, json.dumps(options or {})]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise EngineError(f"the measured process ended with {done.returncode}: {last}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result
