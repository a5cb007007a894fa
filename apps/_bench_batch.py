"""Times a batch against the naive loop, which opens the clip and fills the prompt anew for each task.

Both answer the same questions about the same clips with the same loaded model, in turns. The naive loop's own
steps give the bound: what a batch can gain that shares everything before the questions.
"""

from __future__ import annotations

import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crab_edge_apps._bench_clips import SECONDS, write_clips

from crab_edge.errors import CrabError, EngineError

if TYPE_CHECKING:
    from crab_edge.results import Answer
    from crab_edge.session import Model

# On clips of ten seconds all of these show the model the same frames and the same sound.
FIVE = ("ave", "avvp", "avcap", "avqa", "unav")
TWO = FIVE[:2]
QUESTION = "How many sounds are heard?"
BARS = {2: 1.6, 5: 2.5}
MEMORY_BAR_BYTES = 300_000_000
STEPS = ("decode_s", "features_s", "encode_s", "prefill_s", "generate_s")
MAX_NEW_TOKENS = 512
_CHUNK = 10
"""Clips a turn: decoding ahead works within one."""


@dataclass
class Naive:
    """The naive loop's seconds of one task over all clips, and what it answered."""

    wall_s: float = 0.0
    steps: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STEPS, 0.0))
    raws: list[str] = field(default_factory=list)

    def count(self, answer: Answer, wall_s: float) -> None:
        """Takes one answer."""
        self.wall_s += wall_s
        for name in STEPS:
            self.steps[name] += getattr(answer.timings, name)
        self.raws.append(answer.raw)


@dataclass
class Shared:
    """The batch's seconds over all clips for a list of tasks, and what it answered."""

    tasks: tuple[str, ...]
    wall_s: float = 0.0
    suffix_s: dict[str, float] = field(default_factory=dict)
    """Prefill of the questions alone, of answers that found the prefix in the cache; by task."""
    reused: dict[str, int] = field(default_factory=dict)
    raws: dict[str, list[str]] = field(default_factory=dict)

    def count(self, answer: Answer) -> None:
        """Takes one answer."""
        self.raws.setdefault(answer.task, []).append(answer.raw)
        if answer.timings.cached_tokens:
            self.suffix_s[answer.task] = self.suffix_s.get(answer.task, 0.0) + answer.timings.prefill_s
            self.reused[answer.task] = self.reused.get(answer.task, 0) + 1


def measure(
    clips: int, bundle: Path | None, threads: int, advance: Callable[[int, int], None] = lambda done, of: None
) -> dict[str, Any]:
    """Speed for two and five tasks, the bound, peak memory, and a killed run against a whole one.

    advance: told how many of how many steps are done.
    """
    with tempfile.TemporaryDirectory(prefix="crab-edge-bench-") as name:
        folder = Path(name)
        media = folder / "clips"
        media.mkdir()
        steps = Steps(2 * clips + 3, advance)
        paths = write_clips(media, clips, steps.step)
        result = {
            "clips": clips,
            "threads": threads,
            "seconds_per_clip": SECONDS,
            **_times(paths, bundle, threads, steps),
        }
        command = ["--task", ",".join(FIVE), "--question", QUESTION, "--threads", str(threads)]
        command += ["--max-tokens", str(MAX_NEW_TOKENS)]
        command += ["--bundle", str(bundle)] if bundle else []
        one = _analyze([paths[0]], folder / "one", command)
        steps.step()
        whole = _analyze([media], folder / "whole", command)
        steps.step()
        killed_after = _killed([media], folder / "killed", command, after=len(FIVE) * clips // 2)
        _analyze([media], folder / "killed", command)
        steps.step()
        expected, found = _answers(folder / "whole"), _answers(folder / "killed")
        result["memory"] = {
            "one_clip_bytes": one,
            "all_clips_bytes": whole,
            "bar_bytes": MEMORY_BAR_BYTES,
            "passed": whole - one <= MEMORY_BAR_BYTES,
        }
        result["restart"] = {
            "rows_when_killed": killed_after,
            "rows": len(found),
            "passed": found == expected and len(found) == len(FIVE) * clips,
        }
        return result


class Steps:
    """Progress."""

    def __init__(self, total: int, advance: Callable[[int, int], None]) -> None:
        self._done, self._total, self._advance = 0, total, advance

    def step(self) -> None:
        """One more."""
        self._done += 1
        self._advance(self._done, self._total)


def _times(paths: Sequence[Path], bundle: Path | None, threads: int, steps: Steps) -> dict[str, Any]:
    import crab_edge

    model = crab_edge.load(bundle, threads=threads)
    naive = {name: Naive() for name in FIVE}
    shared = {len(names): Shared(names) for names in (TWO, FIVE)}
    _naive(model, paths[:1], {name: Naive() for name in FIVE}, lambda: None)
    for number, first in enumerate(range(0, len(paths), _CHUNK)):
        chunk = paths[first : first + _CHUNK]
        turns: list[Callable[[], None]] = [lambda chunk=chunk: _naive(model, chunk, naive, steps.step)]  # type: ignore[misc]
        turns += [lambda chunk=chunk, one=one: _batch(model, chunk, one) for one in shared.values()]  # type: ignore[misc]
        # Each turn another one begins, so that a drifting machine favours nobody.
        for place in range(len(turns)):
            turns[(number + place) % len(turns)]()
    return {
        "tasks": list(FIVE),
        "naive": {name: asdict(one) | {"raws": len(one.raws)} for name, one in naive.items()},
        "shared": [_compared(naive, one, len(paths)) for one in shared.values()],
    }


def _naive(model: Model, paths: Sequence[Path], into: dict[str, Naive], step: Callable[[], None]) -> None:
    from crab_edge.session import Model

    for path in paths:
        for name, naive in into.items():
            started = time.perf_counter()
            # A new Model on the loaded engine remembers nothing of the clip before.
            session = Model(model.bundle, model.engine).open(path)
            (answer,) = session.ask_all([name], QUESTION, max_new_tokens=MAX_NEW_TOKENS)
            session.clip.close()
            naive.count(answer, time.perf_counter() - started)
        step()


def _batch(model: Model, paths: Sequence[Path], into: Shared) -> None:
    from crab_edge.session import Model

    started = time.perf_counter()
    # A new Model on the loaded engine, here as well: nothing is left of an earlier turn.
    for row in Model(model.bundle, model.engine).analyze(
        paths, into.tasks, question=QUESTION, max_new_tokens=MAX_NEW_TOKENS
    ):
        if row.answer is None:
            raise EngineError(f"{row.media[0]}, {row.task}: {row.error}")
        into.count(row.answer)
    into.wall_s += time.perf_counter() - started


def _compared(naive: dict[str, Naive], shared: Shared, clips: int) -> dict[str, Any]:
    """One line of the table.

    `bound`: all that comes before the questions done once a clip; `bound_decoding_free`: and decoding hidden.
    """
    before = [naive[name] for name in shared.tasks]
    wall = sum(one.wall_s for one in before)
    generate = sum(one.steps["generate_s"] for one in before)
    suffix = sum(
        shared.suffix_s.get(name, 0.0) / shared.reused[name] * clips
        for name in shared.tasks
        if shared.reused.get(name)
    )
    # The first task's suffix isn't timed apart; it is taken as long as the others'.
    known = sum(1 for name in shared.tasks if shared.reused.get(name))
    suffix *= len(shared.tasks) / known if known else 0.0
    own = sum(one.steps["prefill_s"] for one in before) - suffix
    fixed = statistics.mean(one.wall_s - one.steps["generate_s"] - one.steps["prefill_s"] for one in before)
    fixed += own / len(before)
    decode = statistics.mean(
        one.wall_s - sum(one.steps[name] for name in STEPS if name != "decode_s") for one in before
    )
    once = fixed + suffix + generate
    ratio = wall / shared.wall_s
    return {
        "tasks": list(shared.tasks),
        "naive_s": wall,
        "batch_s": shared.wall_s,
        "ratio": ratio,
        "bar": BARS[len(shared.tasks)],
        "passed": ratio >= BARS[len(shared.tasks)],
        "bound": wall / once,
        "bound_decoding_free": wall / (once - decode),
        "answers_equal": all(shared.raws[name] == naive[name].raws for name in shared.tasks),
        "prefixes_filled": clips * len(shared.tasks) - sum(shared.reused.values()),
    }


def _worker(media: Sequence[Path], out: Path, command: Sequence[str]) -> list[str]:
    arguments = ["analyze", *(str(path) for path in media), "--out", str(out), *command]
    return [sys.executable, "-m", "crab_edge_apps._bench_batch_worker", *arguments]


def _analyze(media: Sequence[Path], out: Path, command: Sequence[str]) -> int:
    """Runs `analyze` in a new process; its peak memory in bytes."""
    done = subprocess.run(_worker(media, out, command), capture_output=True, text=True, check=False)
    last = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 and done.stdout else {"code": -1}
    if last["code"]:
        said = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise EngineError(f"analyze ended with exit code {last['code']}: {said}")
    return int(last["peak_bytes"])


def _killed(media: Sequence[Path], out: Path, command: Sequence[str], after: int) -> int:
    """Starts `analyze`, kills it without warning at `after` rows, and returns how many were there."""
    rows = out / "rows.jsonl"
    child = subprocess.Popen(
        _worker(media, out, command), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        found = read = 0
        while child.poll() is None and found < after:
            time.sleep(0.005)
            if rows.exists():
                with rows.open("rb") as file:
                    file.seek(read)
                    new = file.read()
                found, read = found + new.count(b"\n"), read + len(new)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    if child.returncode != -signal.SIGKILL:
        raise CrabError(f"analyze ended with exit code {child.returncode} before it could be killed")
    return rows.read_bytes().count(b"\n")


def _answers(out: Path) -> list[tuple[Any, ...]]:
    """What a run said, in no order and without its timings."""
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    return sorted(
        (row["media"][0], row["task"], row.get("raw"), json.dumps(row.get("parsed"))) for row in rows
    )


def show(result: dict[str, Any]) -> None:
    """The result as tables."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    clips = result["clips"]
    table = Table(title=f"naive loop: seconds a clip, {clips} clips, {result['threads']} threads")
    for column in ("task", "decode", "features", "encode", "prefill", "answer", "rest", "all"):
        table.add_column(column, justify="left" if column == "task" else "right")
    for name, one in result["naive"].items():
        seconds = [one["steps"][step] / clips for step in STEPS]
        rest = one["wall_s"] / clips - sum(seconds)
        table.add_row(name, *(f"{value:.3f}" for value in (*seconds, rest, one["wall_s"] / clips)))
    console.print(table)
    table = Table(title="batch against it, in turns")
    for column in ("tasks", "naive s", "batch s", "ratio", "bar", "bound", "decoding free", "same answers"):
        table.add_column(column, justify="left" if column == "tasks" else "right")
    for one in result["shared"]:
        table.add_row(
            ",".join(one["tasks"]),
            f"{one['naive_s']:.1f}",
            f"{one['batch_s']:.1f}",
            f"{one['ratio']:.2f}x",
            f"{one['bar']}x{'' if one['passed'] else ', missed'}",
            f"{one['bound']:.2f}x",
            f"{one['bound_decoding_free']:.2f}x",
            "yes" if one["answers_equal"] else "NO",
        )
    console.print(table)
    memory, restart = result["memory"], result["restart"]
    more = (memory["all_clips_bytes"] - memory["one_clip_bytes"]) / 1e6
    console.print(
        f"peak memory: one clip {memory['one_clip_bytes'] / 1e6:.0f} MB, "
        f"{clips} clips {memory['all_clips_bytes'] / 1e6:.0f} MB ({more:+.0f} MB, bar +300 MB)"
    )
    console.print(
        f"killed at {restart['rows_when_killed']} rows and run again: {restart['rows']} rows, "
        + ("equal to the whole run's" if restart["passed"] else "NOT EQUAL to the whole run's")
    )


def problems(result: dict[str, Any]) -> list[str]:
    """Which bars were missed, in words."""
    missed = [
        f"{len(one['tasks'])} tasks: {one['ratio']:.2f}x, expected {one['bar']}x"
        for one in result["shared"]
        if not one["passed"]
    ]
    missed += [
        f"{len(one['tasks'])} tasks: other answers than the naive loop's"
        for one in result["shared"]
        if not one["answers_equal"]
    ]
    memory, restart = result["memory"], result["restart"]
    if not memory["passed"]:
        more = (memory["all_clips_bytes"] - memory["one_clip_bytes"]) / 1e6
        missed.append(f"memory: {more:.0f} MB more than for one clip, expected at most 300")
    if not restart["passed"]:
        missed.append("the restarted run's rows aren't the whole run's")
    return missed
