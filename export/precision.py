"""Which bits go where: the recipes behind `--bits` and the choice of how experts are stored."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from crab_edge.errors import InputError

Experts = Literal["residual4x2", "plane4", "unfolded8", "float"]
KVType = Literal["float32", "float16"]

RECIPES = {4: "w4", 8: "w8", 32: "fp32"}
# 4-bit planes that one experts matrix becomes inside the folded product.
PLANES: dict[str, int] = {"residual4x2": 2, "plane4": 1}


@dataclass(frozen=True)
class Precision:
    """Bits of every kind of weight; 32 means float32 weights in plain products.

    `experts` says where the experts B of an adapted decoder linear go: into the base product as two 4-bit
    residual planes or as one, beside it at 8 bits, or float. `folded` matters for float graphs only
    (low-bit ones say it with `experts`). Encoders' experts always stay beside their base, since their
    widths needn't be multiples of the block.
    """

    bits: int
    block: int = 32
    accuracy_level: int = 4
    experts: Experts = "residual4x2"
    folded: bool = True
    adapter_bits: int = 8
    head_bits: int = 8
    embedding_bits: Literal[8, 32] = 8
    tower_bits: int = 8
    kv_dtype: KVType = "float32"
    block8: int | None = None
    """Weights that share a scale in the 8-bit parts; None: `block`."""

    def block_of(self, bits: int) -> int:
        """Weights that share a scale at this many bits."""
        return self.block8 or self.block if bits == 8 else self.block

    @property
    def name(self) -> str:
        """The recipe's name in the manifest."""
        return RECIPES[self.bits]

    @property
    def folds(self) -> bool:
        """Whether decoder experts join the base product."""
        return self.folded if self.experts == "float" else self.experts in PLANES

    def tower(self) -> Precision:
        """The same for the encoders: all linears at `tower_bits`, experts beside them."""
        experts: Experts = "float" if self.tower_bits == 32 else "unfolded8"
        return Precision(
            self.tower_bits,
            self.block_of(self.tower_bits),
            self.accuracy_level,
            experts,
            False,
            self.adapter_bits,
            self.tower_bits,
        )


def choose(
    bits: int,
    widths: Iterable[int],
    *,
    block: int = 32,
    accuracy_level: int = 4,
    experts: str = "auto",
    kv_dtype: KVType = "float32",
    block8: int | None = None,
) -> Precision:
    """The precision for `--bits`, with `experts="auto"` resolved.

    widths: input widths of the decoder's adapted linears and their N*r; folding needs all of them to be
    multiples of the block, because a block mustn't straddle the seam. "auto" is `residual4x2` where that
    holds at 4 bits (8-bit quality in one product), else `unfolded8`. Raises InputError for what can't be
    combined.
    """
    if bits not in RECIPES:
        raise InputError(f"--bits: expected 4, 8 or 32, got {bits}")
    if block not in (16, 32, 64, 128, 256):
        raise InputError(f"--block: expected 16, 32, 64, 128 or 256, got {block}")
    if accuracy_level not in (0, 1, 4):
        raise InputError(
            f"--accuracy-level: expected 0, 1 (float32) or 4 (int8 activations), got {accuracy_level}"
        )
    uneven = sorted({width for width in widths if width % block})
    allowed = {4: ("residual4x2", "plane4", "unfolded8"), 8: ("unfolded8",), 32: ("float",)}[bits]
    if experts == "auto":
        chosen = "unfolded8" if bits == 4 and uneven else allowed[0]
    elif experts not in allowed:
        raise InputError(
            f"--experts {experts} doesn't go with --bits {bits}; choose one of: auto, {', '.join(allowed)}"
        )
    else:
        chosen = experts
    if chosen in PLANES and uneven:
        raise InputError(
            f"--experts {chosen} needs widths that are multiples of the block {block}, but the model has "
            f"{', '.join(map(str, uneven))}; choose --experts unfolded8"
        )
    if bits == 32:
        return Precision(
            32,
            block,
            0,
            "float",
            adapter_bits=32,
            head_bits=32,
            embedding_bits=32,
            tower_bits=32,
            kv_dtype=kv_dtype,
        )
    return Precision(bits, block, accuracy_level, chosen, kv_dtype=kv_dtype, block8=block8)  # type: ignore[arg-type]
