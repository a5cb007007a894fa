"""A frozen base in 4 or 8 bits (bitsandbytes) to train an I-LoRA adapter on, as in QLoRA.

Linears become `bitsandbytes.nn.Linear4bit` (NF4, blocks of 64, their scales in 8 bits) or `Linear8bitLt`;
embeddings, norms, convolutions, biases and the head stay as they are. Such a base is for training only:
exports quantise the float base anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from crab_edge.errors import DependencyError, ModelError
from crab_edge.ilora.torch_layer import ILoRALayer

BLOCK = 64
_OUTLIER = 6.0  # LLM.int8(): columns of the input beyond it are multiplied unquantised


def quantise_base(
    model: nn.Module,
    bits: int = 4,
    *,
    towers: bool = True,
    compute_dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    storage: torch.dtype = torch.uint8,
) -> list[str]:
    """Replace the linears of a float thinker by quantised ones, in place; the whole model moves to `device`.

    Returns the names of the replaced linears. One linear at a time is quantised, so `device` never holds the
    float weights of all. `towers=False` leaves both encoders in their dtype. `compute_dtype` is the dtype of
    a 4-bit linear's product; `storage` is the dtype that 4-bit weights are packed into: FSDP shards floats
    only.
    ModelError when the model carries an adapter, isn't float, or `bits` isn't 4 or 8.
    """
    if bits not in (4, 8):
        raise ModelError(f"a base is quantised to 4 or 8 bits, got {bits}")
    library = _bitsandbytes()
    for name, module in model.named_modules():
        if isinstance(module, ILoRALayer):
            raise ModelError(f"{name} carries an adapter already: quantise the base, then add_adapter()")
        if is_quantised(module):
            raise ModelError(f"{name} is quantised already ({type(module).__name__}): load the float base")
    chosen = list(_linears(model, towers))
    if not chosen:
        raise ModelError("the model has no linear to quantise: expected a thinker")
    for name, linear in chosen:
        if linear.weight.is_meta or not linear.weight.is_floating_point():
            raise ModelError(f"{name}.weight isn't a float weight in memory: load the base with load_base()")
        if bits == 4:
            made = _four_bits(library, linear, compute_dtype, storage)
        else:
            made = _eight_bits(library, linear)
        made.train(linear.training)
        model.set_submodule(name, made.to(device), strict=True)
    model.to(device)
    model.requires_grad_(False)
    return [name for name, _ in chosen]


def is_quantised(module: nn.Module) -> bool:
    """Whether a linear is one of bitsandbytes'; never imports it."""
    mark = "quant_state" if _packs(module) else "SCB"
    return isinstance(module, nn.Linear) and hasattr(module.weight, mark)


def dequantised(linear: nn.Module) -> Tensor:
    """The float weight [out, in] that a quantised linear stands for, in the dtype it was quantised from.

    8-bit weights come back in float32. ModelError when the linear isn't quantised.
    """
    if not is_quantised(linear):
        raise ModelError(f"{type(linear).__name__} isn't a quantised linear: nothing to dequantise")
    weight: Any = linear.weight
    if _packs(linear):
        if getattr(weight.quant_state, "packing_format_for_cpu", False):
            raise ModelError("this 4-bit weight was repacked by a CPU forward in eval mode: load it anew")
        return _bitsandbytes().functional.dequantize_4bit(weight.data, weight.quant_state)
    scale = weight.SCB if weight.SCB is not None else linear.state.SCB
    return weight.data.float() * (scale.float() / 127)[:, None]


def _packs(module: nn.Module) -> bool:
    return any(kind.__name__ == "Linear4bit" for kind in type(module).__mro__)


def _linears(model: nn.Module, towers: bool) -> Iterator[tuple[str, nn.Linear]]:
    head = getattr(model, "get_output_embeddings", lambda: None)()
    for name, module in model.named_modules():
        inside_tower = "audio_tower." in name or "visual." in name
        if isinstance(module, nn.Linear) and module is not head and (towers or not inside_tower):
            yield name, module


def _four_bits(
    library: ModuleType, linear: nn.Linear, compute: torch.dtype, storage: torch.dtype
) -> nn.Module:
    with torch.device("meta"):
        made = library.nn.Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            compute_dtype=compute,
            compress_statistics=True,
            quant_type="nf4",
            quant_storage=storage,
        )
    made.weight = library.nn.Params4bit(
        linear.weight.data,
        requires_grad=False,
        blocksize=BLOCK,
        compress_statistics=True,
        quant_type="nf4",
        quant_storage=storage,
        module=made,
    )
    made.bias = linear.bias
    return made


def _eight_bits(library: ModuleType, linear: nn.Linear) -> nn.Module:
    with torch.device("meta"):
        made = library.nn.Linear8bitLt(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            has_fp16_weights=False,
            threshold=_OUTLIER,
        )
    made.weight = library.nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
    made.bias = linear.bias
    return made


def _bitsandbytes() -> ModuleType:
    try:
        import bitsandbytes
    except ImportError as error:
        raise DependencyError(
            "a quantised base needs bitsandbytes: run `pip install 'crab-edge[qlora]'`"
        ) from error
    return bitsandbytes
