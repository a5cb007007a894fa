"""What resuming an adapter's training needs: its weights and AdamW's averages, by name; never the base.

A state is written whole by the main process, whether the processes hold copies (DDP) or shards (FSDP), so a
run may continue on another number of them. DeepSpeed shards in its own way and writes its own folder, which
only the same number of processes can read.
"""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from crab_edge.errors import CrabError, InputError
from crab_edge.training.loop import Run, atomic_save

STATE, FOLDER = "adapter.pt", "deepspeed"
BYTES = 12  # a parameter: fp32 weight and two averages


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that learn, by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def whole(tensor: Tensor) -> Tensor:
    """A tensor that FSDP may have sharded, whole, on the CPU. Every process must call it."""
    full = getattr(tensor, "full_tensor", None)
    return (tensor if full is None else full()).detach().cpu()


def adapter_weights(run: Run, module: nn.Module) -> dict[str, Tensor]:
    """The adapter's weights, learning or not, on the CPU of the main process; all must call it."""
    if not run.main and not _is_sharded(module):
        return {}
    return {name: whole(p) for name, p in module.named_parameters() if "lora_" in name}


def save(run: Run, module: nn.Module, optimizer: Any, step: int) -> None:
    """Write the state after `step` steps, complete or not at all. Every process must call it."""
    accelerator, folder = run.accelerator, run.out / "state"
    try:
        if _is_deepspeed(run):
            temporary = folder / f"{FOLDER}.tmp"
            accelerator.save_state(str(temporary), exclude_frozen_parameters=True)
            if run.main:
                about = {"step": step, "processes": accelerator.num_processes}
                (temporary / "run.json").write_text(json.dumps(about), encoding="utf-8")
                shutil.rmtree(folder / FOLDER, ignore_errors=True)
                temporary.rename(folder / FOLDER)
        elif run.main or _is_sharded(module):
            plain = accelerator.unwrap_model(module)
            inner = getattr(optimizer, "optimizer", optimizer)
            averages = {
                name: {key: whole(value) for key, value in inner.state.get(parameter, {}).items()}
                for name, parameter in trainable(plain).items()
            }
            state = {
                "weights": {n: whole(p) for n, p in trainable(plain).items()},
                "optimizer": averages,
                "step": step,
            }
            if run.main:
                atomic_save(state, folder / STATE)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        (folder / f"{STATE}.tmp").unlink(missing_ok=True)
        raise CrabError(
            f"{folder}: no space left for the checkpoint of step {step}; free some and run the same command: "
            "it continues from the checkpoint before"
        ) from error
    accelerator.wait_for_everyone()


def restore(run: Run, module: nn.Module, optimizer: Any) -> int:
    """Read the state into the prepared module and optimizer; returns its step, 0 when there is none."""
    accelerator, folder = run.accelerator, run.out / "state"
    if _is_deepspeed(run):
        about = folder / FOLDER / "run.json"
        if not about.exists():
            return _none_of_the_other(folder / STATE, "without DeepSpeed")
        found = json.loads(about.read_text(encoding="utf-8"))
        if found["processes"] != accelerator.num_processes:
            raise InputError(
                f"{about.parent} was written by {found['processes']} processes, this run has "
                f"{accelerator.num_processes}: DeepSpeed needs the same number; or --fresh to start over"
            )
        accelerator.load_state(str(about.parent), load_module_strict=False)
        return int(found["step"])
    path = folder / STATE
    if not path.exists():
        return _none_of_the_other(folder / FOLDER, "with DeepSpeed")
    saved = torch.load(path, map_location="cpu", weights_only=True)
    own = trainable(accelerator.unwrap_model(module))
    inner = getattr(optimizer, "optimizer", optimizer)
    if own.keys() != saved["weights"].keys():
        raise InputError(f"{path} is of an adapter on other linears; give another --out, or --fresh")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(_placed(saved["weights"][name], parameter))
            averages = saved["optimizer"][name]
            # AdamW keeps its step count as a scalar on the CPU.
            inner.state[parameter] = {
                key: value if value.ndim == 0 else _placed(value, parameter)
                for key, value in averages.items()
            }
    return int(saved["step"])


def remove(out: Path) -> None:
    """Forget the state of a finished run."""
    (out / "state" / STATE).unlink(missing_ok=True)
    shutil.rmtree(out / "state" / FOLDER, ignore_errors=True)


def _is_deepspeed(run: Run) -> bool:
    return run.accelerator.distributed_type.value == "DEEPSPEED"


def _is_sharded(module: nn.Module) -> bool:
    return any(hasattr(parameter, "full_tensor") for parameter in trainable(module).values())


def _none_of_the_other(path: Path, how: str) -> int:
    if path.exists():
        raise InputError(f"{path} was written {how}: continue in the same way, or --fresh to start over")
    return 0


def _placed(value: Tensor, parameter: nn.Parameter) -> Tensor:
    """A whole tensor on the parameter's device, sharded as the parameter is."""
    value = value.to(parameter.device, parameter.dtype)
    if hasattr(parameter, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(value, parameter.device_mesh, parameter.placements)
    return value
