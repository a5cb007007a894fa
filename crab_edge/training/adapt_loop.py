"""The optimizer's steps of an adapter on a given base, on any number of processes.

What a step sees depends on its number alone: records, dropout, learning rate. So a run that was killed ends
in the same adapter as one that wasn't, and two processes take the steps that one takes with two accumulated
forwards, up to rounding.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from crab_edge.errors import CheckError, InputError
from crab_edge.training import checkpoint
from crab_edge.training.adapt_recipe import Steps
from crab_edge.training.data import batches
from crab_edge.training.loop import LOG_SECONDS, Killed, Run
from crab_edge.training.records import Unusable

STAGE = "adapter"


@dataclass(frozen=True)
class Plan:
    """`steps` of `accumulation` forwards on each process; after the steps `snapshots` the adapter is kept."""

    steps: int
    accumulation: int
    snapshots: frozenset[int]


def plan(recipe: Steps, records: int, processes: int) -> Plan:
    """How many steps, and how they are split. InputError when the processes can't share a step evenly."""
    together = recipe.batch * processes
    if recipe.global_batch % together:
        raise InputError(
            f"steps.global_batch {recipe.global_batch} isn't a multiple of {processes} processes x "
            f"steps.batch {recipe.batch}: run on fewer processes, or set a smaller steps.batch"
        )
    steps = math.ceil(recipe.epochs * records / recipe.global_batch)
    if recipe.max_steps is not None:
        steps = min(steps, recipe.max_steps)
    every = math.ceil(recipe.snapshot_share * steps)
    kept = frozenset(range(every, steps, every)) if every else frozenset()
    return Plan(steps, recipe.global_batch // together, kept)


def cosine(step: int, steps: int, warmup_ratio: float) -> float:
    """Factor of the learning rate in step `step` (from 0): linear from 0, then half a cosine to 0.

    As transformers' "cosine" schedule, which the Crab+ reference uses.
    """
    warmup = math.ceil(warmup_ratio * steps)
    if step < warmup:
        return step / max(1, warmup)
    return 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def train(
    module: nn.Module,
    make: Callable[[int], Any],
    recipe: Steps,
    schedule: Plan,
    run: Run,
    snapshot: Callable[[nn.Module, int], None],
) -> tuple[nn.Module, dict[str, float]]:
    """Take the steps that are left; returns the prepared module and the last figures.

    `module(batch)` gives {"loss": ..., ...}; `make(i)` is micro-batch i; `snapshot(module, step)` is called
    on every process. CheckError when the loss isn't a number any more, InputError for a record that can't be
    read.
    """
    accelerator = run.accelerator
    rank, world = accelerator.process_index, accelerator.num_processes
    prepared, optimizer = _prepare(module, recipe, schedule, accelerator)
    step = first = checkpoint.restore(run, prepared, optimizer)
    each = schedule.accumulation
    source: Iterator[Any] = batches(
        make, step * each, schedule.steps * each, workers=run.workers, world=world, rank=rank
    )
    prepared.train()
    started = last_log = time.monotonic()
    mean, count, rows = 0.0, 0, {}
    while step < schedule.steps:
        lr = recipe.lr * cosine(step, schedule.steps, recipe.warmup_ratio)
        for group in optimizer.param_groups:
            group["lr"] = lr
        losses = [
            _forward(prepared, optimizer, next(source), (step * each + i) * world + rank, recipe, run)
            for i in range(each)
        ]
        loss = float(accelerator.reduce(torch.stack(losses).mean(), reduction="mean"))
        step += 1
        if not math.isfinite(loss):
            raise CheckError(
                f"{STAGE}: the loss is not finite at step {step}; lower steps.lr in the recipe and start over"
            )
        mean, count, now = mean + loss, count + 1, time.monotonic()
        if run.progress is not None and run.main:
            run.progress(STAGE, step, schedule.steps, {"loss": loss, "lr": lr})
        if now - last_log > LOG_SECONDS or step == schedule.steps:
            rows = {"loss": round(mean / count, 4)}
            seconds = {
                "minutes": round((now - started) / 60, 2),
                "s_per_step": round((now - last_log) / count, 3),
            }
            run.log({"stage": STAGE, "step": step, **seconds, "lr": lr, **rows})
            mean, count, last_log = 0.0, 0, now
        if step in schedule.snapshots:
            snapshot(accelerator.unwrap_model(prepared), step)
        killed = run.stop_after is not None and step - first >= run.stop_after
        if step % recipe.checkpoint_steps == 0 or step == schedule.steps or killed:
            checkpoint.save(run, prepared, optimizer, step)
        if killed:
            raise Killed(STAGE)
    return accelerator.unwrap_model(prepared), {"steps": step, **rows}


def _prepare(module: nn.Module, recipe: Steps, schedule: Plan, accelerator: Any) -> tuple[nn.Module, Any]:
    accelerator.gradient_accumulation_steps = schedule.accumulation
    if accelerator.distributed_type.value == "DEEPSPEED":
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        # DeepSpeed asks a data loader for these, and there is none.
        config["train_micro_batch_size_per_gpu"] = recipe.batch
        config["gradient_accumulation_steps"] = schedule.accumulation
        config["gradient_clipping"] = recipe.clip_norm
    learning = list(checkpoint.trainable(module).values())
    optimizer = torch.optim.AdamW(
        learning, lr=recipe.lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=recipe.weight_decay
    )
    return accelerator.prepare(module, optimizer)


def _forward(
    module: nn.Module, optimizer: Any, batch: Any, number: int, recipe: Steps, run: Run
) -> torch.Tensor:
    """One micro-batch forward and backward; the last of a step moves the weights. Returns its loss."""
    accelerator = run.accelerator
    if isinstance(batch, Unusable):
        raise InputError(
            f"{batch.message}; repair or replace the file and run the same command: it continues from the "
            "last checkpoint"
        )
    # Dropout's own seed for every micro-batch of the run.
    torch.manual_seed((run.seed * 1_000_003 + number) % 2**63)
    with accelerator.accumulate(module):
        moved = {k: v.to(accelerator.device, non_blocking=True) for k, v in batch.items()}
        loss = module(moved)["loss"]
        accelerator.backward(loss)
        if accelerator.sync_gradients:
            accelerator.clip_grad_norm_(module.parameters(), recipe.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
    return loss.detach().float()
