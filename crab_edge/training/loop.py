"""The loop all stages share: accelerate, cosine by progress, checkpoints that survive a kill, a loss log.

A stage is a module whose forward takes a batch and returns a dictionary of losses with the entry "loss".
Batches are functions of the step number, so a checkpoint is the weights, the optimizer, the random state and
the step.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from crab_edge.errors import CheckError
from crab_edge.training.data import batches
from crab_edge.training.recipe import StageRecipe

LOG_SECONDS = 20.0


@dataclass
class Stage:
    """One stage: `module(batch) -> {"loss": ..., ...}`, parameter groups with an `lr_scale`, `make(step)`."""

    name: str
    module: nn.Module
    groups: list[dict[str, Any]]
    make: Callable[[int], Any]
    recipe: StageRecipe


@dataclass
class Run:
    """A run's folder and the machine it is on."""

    out: Path
    precision: str = "auto"
    workers: int = 1
    checkpoint_s: float = 120.0
    progress: Callable[[str, int, int, dict[str, float]], None] | None = None
    seed: int = 42
    stop_after: int | None = None  # tests: leave as if killed after so many steps of a stage
    accelerator: Any = field(default=None, repr=False)

    def __post_init__(self) -> None:
        (self.out / "state").mkdir(parents=True, exist_ok=True)
        if self.accelerator is None:
            from accelerate import Accelerator

            self.accelerator = Accelerator(mixed_precision=choose_precision(self.precision))

    @property
    def main(self) -> bool:
        return bool(self.accelerator.is_main_process)

    def log(self, row: dict[str, Any]) -> None:
        """Append one row to log.jsonl."""
        if self.main:
            with (self.out / "log.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


class Killed(Exception):
    """Raised by `Run.stop_after`, in tests only."""


def choose_precision(name: str) -> str:
    """accelerate's name of a precision; "auto" takes bf16 where this machine multiplies faster in it."""
    if name == "fp32":
        return "no"
    if name == "bf16":
        return "bf16"
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported() else "no"
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.ones(1024, 256, dtype=dtype), torch.ones(768, 256, dtype=dtype)
        torch.nn.functional.linear(a, b)
        start = time.perf_counter()
        for _ in range(10):
            torch.nn.functional.linear(a, b)
        seconds[dtype] = time.perf_counter() - start
    return "bf16" if seconds[torch.bfloat16] < 0.8 * seconds[torch.float32] else "no"


def lr_factor(progress: float, warmup: float, final: float) -> float:
    """Linear warm-up, then a cosine from 1 to `final`; progress 0..1."""
    if progress < warmup:
        return max(progress, 1e-3) / warmup
    share = min((progress - warmup) / max(1.0 - warmup, 1e-9), 1.0)
    return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * share))


def atomic_save(value: Any, path: Path) -> None:
    """torch.save, complete or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        torch.save(value, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def finished(run: Run, name: str) -> dict[str, Any] | None:
    """What `finish` stored for a stage, None when the stage isn't done."""
    path = run.out / "state" / f"{name}.done.pt"
    return torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None


def finish(run: Run, name: str, state: dict[str, Any]) -> None:
    """Mark a stage as done, with the weights that the next stages need; its checkpoint goes."""
    run.accelerator.wait_for_everyone()
    if run.main:
        atomic_save(state, run.out / "state" / f"{name}.done.pt")
        (run.out / "state" / f"{name}.pt").unlink(missing_ok=True)
    run.accelerator.wait_for_everyone()


def _trainable(module: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach() for n, p in module.named_parameters() if p.requires_grad}


def _means(seen: dict[str, list[float]]) -> dict[str, float]:
    """Of each loss over the steps that had it."""
    return {name: round(sum(values) / len(values), 4) for name, values in seen.items()}


def _to(batch: Any, device: torch.device) -> Any:
    return {k: v.to(device, non_blocking=True) for k, v in batch.items()}


def run_stage(stage: Stage, run: Run) -> dict[str, float]:
    """Train one stage, from its checkpoint if there is one; returns steps, minutes and the last mean losses.

    CheckError when the loss isn't a number any more.
    """
    recipe, accelerator = stage.recipe, run.accelerator
    torch.manual_seed(run.seed)
    groups = [dict(g, lr=recipe.lr * g.get("lr_scale", 1.0)) for g in stage.groups]
    base_lr = [g["lr"] for g in groups]
    optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.999), weight_decay=recipe.weight_decay)
    module, optimizer = accelerator.prepare(stage.module, optimizer)
    plain = accelerator.unwrap_model(module)
    path = run.out / "state" / f"{stage.name}.pt"
    step, before = 0, 0.0
    if path.exists():
        saved = torch.load(path, map_location="cpu", weights_only=True)
        own = dict(plain.named_parameters())
        with torch.no_grad():
            for name, value in saved["weights"].items():
                own[name].copy_(value)
        optimizer.load_state_dict(saved["optimizer"])
        torch.set_rng_state(saved["rng"])
        step, before = saved["step"], saved["elapsed"]

    def save(elapsed: float) -> None:
        if run.main:
            state = {
                "weights": _trainable(plain),
                "optimizer": optimizer.state_dict(),
                "rng": torch.get_rng_state(),
                "step": step,
                "elapsed": elapsed,
            }
            atomic_save(state, path)

    module.train()
    start = last_save = last_log = time.monotonic()
    seen: dict[str, list[float]] = {}
    count, rows = 0, {}
    source: Iterator[Any] = batches(
        stage.make,
        step,
        recipe.steps,
        workers=run.workers,
        world=accelerator.num_processes,
        rank=accelerator.process_index,
    )
    first_step = step
    while step < recipe.steps:
        elapsed = before + time.monotonic() - start
        progress = max((step + 0.5) / recipe.steps, elapsed / (60 * recipe.max_minutes))
        if progress >= 1.0:
            break
        factor = lr_factor(progress, recipe.warmup_ratio, recipe.final_lr_ratio)
        for group, lr in zip(optimizer.param_groups, base_lr, strict=True):
            group["lr"] = lr * factor
        batch = next(source, None)
        if batch is None:
            break
        losses = module(_to(batch, accelerator.device))
        loss = losses["loss"]
        if not bool(torch.isfinite(loss.detach())):
            raise CheckError(
                f"{stage.name}: the loss is not finite at step {step}; lower lr in the recipe and resume"
            )
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(
            [p for g in optimizer.param_groups for p in g["params"]], recipe.clip_norm
        )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        count += 1
        for name, value in losses.items():
            seen.setdefault(name, []).append(float(value.detach()))
        now = time.monotonic()
        if run.progress is not None:
            run.progress(
                stage.name, step, recipe.steps, {"loss": float(loss.detach()), "lr": base_lr[0] * factor}
            )
        if now - last_log > LOG_SECONDS or step == recipe.steps:
            rows = _means(seen)
            run.log(
                {
                    "stage": stage.name,
                    "step": step,
                    "minutes": round((before + now - start) / 60, 2),
                    "s_per_step": round((now - last_log) / count, 3),
                    "lr": base_lr[0] * factor,
                    **rows,
                }
            )
            seen, count, last_log = {}, 0, now
        if now - last_save > run.checkpoint_s:
            save(before + now - start)
            last_save = time.monotonic()
        if run.stop_after is not None and step - first_step >= run.stop_after:
            save(before + time.monotonic() - start)
            raise Killed(stage.name)
    del source
    minutes = (before + time.monotonic() - start) / 60
    if seen:
        rows = _means(seen)
    save(minutes * 60)
    accelerator.free_memory()
    return {"steps": step, "minutes": round(minutes, 2), **rows}


def plot_losses(out: Path) -> Path | None:
    """Draw log.jsonl as losses.png, one panel a stage."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    path = out / "log.jsonl"
    if not path.exists():
        return None
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    rows = [r for r in rows if "loss" in r]
    names = list(dict.fromkeys(r["stage"] for r in rows))
    if not names:
        return None
    figure, axes = plt.subplots(1, len(names), figsize=(4.5 * len(names), 3.4), squeeze=False)
    skip = {"stage", "step", "minutes", "s_per_step", "lr"}
    for axis, name in zip(axes[0], names, strict=True):
        own = [r for r in rows if r["stage"] == name]
        for key in [k for k in own[-1] if k not in skip]:
            axis.plot([r["step"] for r in own if key in r], [r[key] for r in own if key in r], label=key)
        axis.set(title=name, xlabel="step", yscale="log")
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(out / "losses.png", dpi=110)
    plt.close(figure)
    return out / "losses.png"
