"""Trains an I-LoRA adapter on the base in a directory: Crab+'s own step, on 16 or, as QLoRA, 4-bit weights.

OUT/adapter is the result, a PEFT directory; OUT/snapshots its earlier forms, OUT/state what resuming needs,
OUT/log.jsonl the losses. The base is read, never written or copied. The same command continues a run that was
killed. Started by `accelerate launch` it runs on every process that accelerate gives it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from crab_edge.errors import InputError
from crab_edge.features import FeatureConfig
from crab_edge.model import (
    ILoRAConfig,
    adapted_layers,
    add_adapter,
    load_base,
    open_model_dir,
    save_adapter,
)
from crab_edge.prompt import PromptBuilder
from crab_edge.training import adapt_loop, checkpoint
from crab_edge.training.adapt_recipe import AdapterRecipe
from crab_edge.training.language import LanguageModule
from crab_edge.training.loop import Run, choose_precision, plot_losses
from crab_edge.training.progress import Tick
from crab_edge.training.records import RecordBatches, Records

_MAY_CHANGE = {"base": ("path",), "data": ("root", "workers"), "steps": ("checkpoint_steps",)}
_GB = 1e9


class AdapterModule(LanguageModule):
    """Cross-entropy of the answers alone; computes in `compute_dtype` whatever wraps it."""

    def __init__(
        self, model: nn.Module, special: Any, compute_dtype: torch.dtype, train_towers: bool
    ) -> None:
        super().__init__(model, special, (), train_towers=train_towers)
        self.compute_dtype = compute_dtype

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        low = self.compute_dtype != torch.float32
        # Inside the module: DeepSpeed casts weights, but no inputs, and leaves no autocast around it.
        with torch.autocast(batch["ids"].device.type, self.compute_dtype, enabled=low):
            return super().forward(batch)


def train_adapter(
    recipe: AdapterRecipe,
    out: Path,
    *,
    say: Callable[[str], None] = print,
    progress: Tick | None = None,
    fresh: bool = False,
    records: Records | None = None,
    stop_after: int | None = None,
) -> Path:
    """Run what isn't done yet; returns OUT/adapter. Every process that was launched calls it.

    `fresh` starts over; after `stop_after` steps it leaves as if killed (tests).
    InputError and ModelError for a base, data or recipe that don't fit, before anything is written.
    """
    assert recipe.base.path is not None
    base = Path(recipe.base.path)
    features = _checked(recipe, base)
    if records is None:
        from crab_edge.training.avuie import AvuieScenes, train_lists

        records = AvuieScenes(train_lists(recipe.data))
    identity = _identity(recipe, base, len(records))
    accelerator = open_accelerator(recipe, parts_missing=not records.complete)
    schedule = adapt_loop.plan(recipe.steps, len(records), accelerator.num_processes)
    if fresh and accelerator.is_main_process:
        start_over(out)
    accelerator.wait_for_everyone()
    _same_run(identity, out)
    done = out / "adapter"
    if (done / "adapter_config.json").exists():
        return done
    run = Run(
        out,
        recipe.precision,
        workers=recipe.data.workers,
        seed=recipe.seed,
        progress=progress,
        stop_after=stop_after,
        accelerator=accelerator,
    )
    module, model = build_module(recipe, run)
    count = sum(p.numel() for p in checkpoint.trainable(module).values())
    _check_space(out, count * checkpoint.BYTES * 2 + (len(schedule.snapshots) + 1) * 4 * count)
    if run.main:
        (out / "recipe.json").write_text(json.dumps(identity, indent=2) + "\n", encoding="utf-8")
        say(
            f"{len(records):,} records, {schedule.steps:,} steps of {recipe.steps.global_batch} on "
            f"{accelerator.num_processes} process(es), {count:,} parameters learn"
        )
    make = RecordBatches(
        records, (str(base / "tokenizer.json"), features), batch=recipe.steps.batch, seed=recipe.seed
    )
    dtype = module.compute_dtype

    def snapshot(now: nn.Module, step: int) -> None:
        _publish(run, model, now, out / "snapshots" / f"step-{step:06d}", dtype)

    trained, figures = adapt_loop.train(module, make, recipe.steps, schedule, run, snapshot)
    _publish(run, model, trained, done, dtype)
    if run.main:
        checkpoint.remove(out)
        run.log({"stage": adapt_loop.STAGE, "figures": figures})
        plot_losses(out)
    run.accelerator.wait_for_everyone()
    return done


def open_accelerator(recipe: AdapterRecipe, parts_missing: bool = False) -> Any:
    """accelerate's view of the machine: processes, devices, precision; DDP, FSDP or DeepSpeed as launched.

    `parts_missing`: some records lack a picture or a sound, so that an encoder's adapters may be left out.
    """
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin

    return Accelerator(
        mixed_precision=choose_precision(recipe.precision),
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1, sync_with_dataloader=False),
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=parts_missing)],
    )


def build_module(recipe: AdapterRecipe, run: Run) -> tuple[AdapterModule, nn.Module]:
    """(module with the loss, PEFT model inside it): frozen base, fresh float32 adapter, checkpointing set."""
    assert recipe.base.path is not None
    low = run.accelerator.mixed_precision == "bf16"
    dtype, device = torch.bfloat16 if low else torch.float32, run.accelerator.device
    thinker = load_base(recipe.base.path, dtype=dtype)
    if recipe.base.quantise:
        from crab_edge.model.quantised import quantise_base

        sharded = run.accelerator.distributed_type.value == "FSDP"
        quantise_base(
            thinker,
            recipe.base.quantise,
            towers=recipe.base.quantise_towers,
            compute_dtype=dtype,
            device=device,
            storage=dtype if sharded else torch.uint8,
        )
    sizes = recipe.adapter
    config = ILoRAConfig(
        r=sizes.rank, lora_alpha=sizes.alpha, lora_dropout=sizes.dropout, num_experts=sizes.experts
    )
    model = add_adapter(thinker, config, towers=sizes.towers, seed=recipe.seed)
    learn_towers = sizes.towers and sizes.train_towers
    for name, layer in adapted_layers(model).items():
        asleep = not learn_towers and ("audio_tower." in name or "visual." in name)
        for parameter in (p for n, p in layer.named_parameters() if n.startswith("lora_")):
            # Small steps vanish in bf16 weights; products still are in the base's dtype, by autocast.
            parameter.data = parameter.data.float()
            parameter.requires_grad_(not asleep)
        if asleep:
            layer.enable_adapters(False)
    if recipe.steps.checkpointing:
        checkpoint_activations(thinker)
    # The tokenizer's own ids: the official config.json lacks some of them.
    special = PromptBuilder(Path(recipe.base.path) / "tokenizer.json", FeatureConfig()).special
    return AdapterModule(model, special, dtype, learn_towers), model


def checkpoint_activations(thinker: nn.Module, *, reentrant: bool = False) -> None:
    """Recompute the activations of decoder layers and encoder blocks in the backward pass.

    Reentrant checkpointing (the reference's) passes no gradient to weights whose block has no input with a
    gradient: no encoder adapter would learn.
    """
    switch = (
        getattr(thinker, "activation_checkpointing_enable", None) or thinker.gradient_checkpointing_enable
    )
    switch({"use_reentrant": reentrant})
    # Transformers makes the inputs require gradients, for reentrant's sake. They are of no use here.
    thinker.disable_input_require_grads()


def _publish(run: Run, model: nn.Module, module: nn.Module, out: Path, dtype: torch.dtype) -> None:
    """Write the adapter as a PEFT directory, complete or not at all, in the dtype that it was used in."""
    weights = checkpoint.adapter_weights(run, module)
    if run.main:
        named = {n.removeprefix("model."): t.to(dtype).contiguous() for n, t in weights.items()}
        temporary = out.with_name(out.name + ".tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        save_adapter(model, temporary, named)
        shutil.rmtree(out, ignore_errors=True)
        temporary.rename(out)
    run.accelerator.wait_for_everyone()


def _checked(recipe: AdapterRecipe, base: Path) -> FeatureConfig:
    """What the base's prompts and media need; refuses a base of another size than the recipe is for."""
    opened, wanted = open_model_dir(base), recipe.base.hidden_size
    found = opened.config.text_config.hidden_size
    if wanted is not None and found != wanted:
        raise InputError(
            f"recipe {recipe.name} is for a base of width {wanted}, {base} has {found}: choose the other "
            "recipe or the other base"
        )
    return opened.features


def _identity(recipe: AdapterRecipe, base: Path, records: int) -> dict[str, Any]:
    """The recipe, the base's files and the number of records: what makes a run what it is."""
    files = {path.name: path.stat().st_size for path in sorted(base.glob("model*.safetensors"))}
    config = sha256((base / "config.json").read_bytes()).hexdigest()
    plain = recipe.model_dump(mode="json")
    plain["base"] |= {"config": config, "files": files}
    return {**plain, "records": records}


def _same_run(new: dict[str, Any], out: Path) -> None:
    path = out / "recipe.json"
    if not path.exists():
        return
    old = json.loads(path.read_text(encoding="utf-8"))
    differ = sorted(key for key in old.keys() | new.keys() if _kept(key, old) != _kept(key, new))
    if differ:
        raise InputError(
            f"{out} was begun with another recipe, base or data (they differ in {', '.join(differ)}): "
            "give another --out, or --fresh to start over"
        )


def _kept(key: str, identity: dict[str, Any]) -> Any:
    """An entry without what may change while a run goes on."""
    value = identity.get(key)
    if isinstance(value, dict):
        return {k: v for k, v in value.items() if k not in _MAY_CHANGE.get(key, ())}
    return value


def start_over(out: Path) -> None:
    """Remove what a run left in `out`, and nothing else."""
    for name in ("state", "adapter", "adapter.tmp", "snapshots"):
        shutil.rmtree(out / name, ignore_errors=True)
    for name in ("recipe.json", "log.jsonl", "losses.png"):
        (out / name).unlink(missing_ok=True)


def _check_space(out: Path, needed: int) -> None:
    free = shutil.disk_usage(out).free
    if free < needed:
        raise InputError(
            f"{out}: the run writes up to {needed / _GB:.1f} GB (checkpoints and adapters), "
            f"{free / _GB:.1f} GB are free; make room or give another --out"
        )
