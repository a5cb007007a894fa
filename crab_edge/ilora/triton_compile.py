"""Kernels compiled ahead of time: PTX text for a compute capability, on a machine without a GPU.

The PTX is what an engine or `cuLaunchKernel` takes: parameters are pointers to inputs in the kernel's order,
one int32 (rows M), the pointer to the output, then two that Triton appends (scratch memory) and that no
kernel here reads; `compile_kernel` makes sure of that, and that ptxas takes the text.

The PTX version is pinned, because Triton writes the newest it knows and a driver refuses versions newer than
itself: 8.5 (CUDA 12.5), and for cards that it doesn't know 8.7 (CUDA 12.8), 8.8 (12.9) or, for sm_110, 9.0
(CUDA 13.0).
"""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Any

from ..errors import CrabError, DependencyError, InputError
from . import triton_tiles

ARCHITECTURES: Mapping[int, int] = MappingProxyType(
    {80: 85, 86: 85, 87: 85, 89: 85, 90: 85, 100: 87, 103: 88, 110: 90, 120: 87, 121: 88}
)
"""Compute capabilities that kernels are made for, with the lowest PTX version used for each."""
DTYPES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}
HIDDEN = 2
KERNELS: Mapping[str, str] = MappingProxyType(
    {"linear": "linear_kernel", "experts": "experts_kernel", "route": "route_kernel"}
)


@dataclass(frozen=True)
class CompiledKernel:
    """One kernel for one compute capability, and how it is launched.

    parameters: names in order, without the hidden ones; the grid is (ceil(M / columns), programs, 1); a
    program has 32 * num_warps threads and `shared` bytes of dynamic shared memory.
    """

    ptx: str
    cubin: bytes
    entry: str
    sm: int
    num_warps: int
    shared: int
    columns: int
    programs: int
    parameters: tuple[str, ...]
    hidden_parameters: int = HIDDEN

    @property
    def threads(self) -> int:
        """Threads of a program (of a CUDA block)."""
        return 32 * self.num_warps

    def grid(self, rows: int) -> tuple[int, int, int]:
        """CUDA blocks for `rows` rows of activations."""
        return -(-rows // self.columns), self.programs, 1


def linear_constants(
    rows: int,
    n: int,
    k1: int,
    bits: int,
    block: int,
    *,
    k2: int = 0,
    planes: int = 0,
    splits: tuple[int, ...] = (),
    beside: tuple[int, int] = (0, 0),
) -> dict[str, int]:
    """Constants of "linear" for `rows` rows (1: the decode form, 64: the prefill form; both take any number).

    n, k1: rows and columns of W; k2: columns of one linear's z, `planes` times in the weight; splits: first
    rows of the second and third linear where several are one weight; beside: bits and block of a second
    weight of k2 columns.
    """
    blocks = -(-k1 // block) + planes * -(-k2 // block)
    tile = triton_tiles.linear_tile(rows, n, blocks * block, bits, block, splits, beside)
    first, second = (*splits, 0, 0)[:2]
    bits_e, block_e = beside if beside[0] else (0, 16)
    return {
        "N": n, "K1": k1, "K2": k2, "XS": k1, "ZS": k2 * (len(splits) + 1), "PLANES": planes,
        "SPLIT0": first, "SPLIT1": second, "BITS": bits, "BLOCK": block,
        "BITS_E": bits_e, "BLOCK_E": block_e, "C_E": triton_tiles.chunk_bytes(bits_e or 8, block_e),
        **_tile(tile, "BN"),
    }  # fmt: skip


def experts_constants(rows: int, n: int, k: int, bits: int, block: int) -> dict[str, int]:
    """Constants of "experts": n rows and k columns of sB; `rows` as for `linear_constants`."""
    tile = triton_tiles.linear_tile(rows, n, -(-k // block) * block, bits, block)
    return {"N": n, "K1": k, "XS": k, "BITS": bits, "BLOCK": block, **_tile(tile, "BN")}


def route_constants(
    rows: int, k: int, bits: int, block: int, *, rank: int, experts: int, groups: int
) -> dict[str, int]:
    """Constants of "route" over k columns; `rows` as for `linear_constants`."""
    tile = triton_tiles.route_tile(rows, k, bits, block, rank, experts, groups)
    sizes = {"K1": k, "XS": k, "RANK": rank, "EXPERTS": experts, "GROUPS": groups}
    return {**sizes, "BITS": bits, "BLOCK": block, "BA": tile.down, **_tile(tile, "BT")}


def compile_kernel(
    name: str,
    sm: int,
    *,
    constants: Mapping[str, int],
    dtype: str,
    scales: str = "float16",
    scales_beside: str = "float16",
    bias: bool = False,
    ptx_version: int = 85,
) -> CompiledKernel:
    """The kernel `name` ("linear", "experts", "route") for compute capability `sm`, e.g. 87.

    constants: of `linear_constants`, `experts_constants` or `route_constants`; dtype: of activations and
    result, "float16" or "bfloat16"; scales, scales_beside: of the weights' scales, as `gpu_layout` chose
    them; bias: whether "linear" takes one, of the activations' dtype. ptx_version: the highest the target's
    driver takes at least (87 is 8.7); a capability that is newer gets the first version that knows it.
    InputError for a name or capability that isn't there, CrabError when ptxas refuses the result.
    """
    if name not in KERNELS:
        raise InputError(f"no kernel {name!r}; expected one of {', '.join(KERNELS)}")
    if sm not in ARCHITECTURES:
        raise InputError(f"no kernels for sm_{sm}; expected one of {', '.join(map(str, ARCHITECTURES))}")
    if dtype not in ("float16", "bfloat16") or not {scales, scales_beside} <= {"float16", "float32"}:
        raise InputError(f"kernel {name} with activations {dtype} and scales {scales} doesn't exist")
    values = dict(constants)
    warps, stages, columns = values.pop("WARPS"), values["STAGES"], values["BM"]
    kinds = {"q": "u8", "qe": "u8", "s": DTYPES[scales], "se": DTYPES[scales_beside]}
    absent = _absent(name, values, bias)
    function = _function(name)
    signature, fixed, aligned, parameters = {}, {}, {}, []
    for index, argument in enumerate(function.arg_names):
        plain = argument.removesuffix("_ptr")
        if argument in values or argument == "ASM" or plain in absent:
            signature[argument] = "constexpr"
            fixed[(index,)] = True if argument == "ASM" else values.get(argument)
        elif argument == "M":
            signature[argument] = "i32"
            parameters.append(argument)
        else:
            signature[argument] = "*" + kinds.get(plain, DTYPES[dtype])
            aligned[(index,)] = [["tt.divisibility", 16]]
            parameters.append(plain)
    options = {"num_warps": warps, "num_stages": stages, "ptx_version": max(ptx_version, ARCHITECTURES[sm])}
    options["enable_fp_fusion"] = True
    compiled = _compile(function, signature, fixed, aligned, sm, options)
    ptx = compiled.asm["ptx"]
    _check_hidden(ptx, len(parameters))
    shared = int(compiled.metadata.shared)
    if shared > triton_tiles.SHARED:
        raise CrabError(f"kernel {name} takes {shared} bytes of shared memory, at most {triton_tiles.SHARED}")
    return CompiledKernel(
        ptx, compiled.asm["cubin"], compiled.metadata.name, sm, warps, shared, columns,
        _programs(name, values), tuple(parameters),
    )  # fmt: skip


def _tile(tile: triton_tiles.Tile, rows: str) -> dict[str, int]:
    return {
        "C": tile.chunk, rows: tile.rows, "BM": tile.columns, "KS": tile.chunks, "STAGES": tile.stages,
        "WARPS": tile.warps,
    }  # fmt: skip


def _absent(name: str, values: Mapping[str, int], bias: bool) -> set[str]:
    """Pointers that a variant of "linear" doesn't have."""
    if name != "linear":
        return set()
    absent = set() if bias else {"bias"}
    if not values["BITS_E"]:
        absent |= {"qe", "se"} if values["PLANES"] else {"qe", "se", "z"}
    return absent


def _programs(name: str, values: Mapping[str, int]) -> int:
    if name == "route":
        return values["GROUPS"] * -(-values["RANK"] // values["BA"])
    return -(-values["N"] // values["BN"])


@cache
def _function(name: str) -> Any:
    try:
        from triton import knobs

        from . import triton_kernels
    except ImportError:
        raise DependencyError(
            "kernels are compiled by triton, which isn't installed; run `pip install 'crab-edge[cuda]'`"
        ) from None
    if knobs.runtime.interpret:
        raise InputError("TRITON_INTERPRET is set, and interpreted kernels can't be compiled; unset it")
    return getattr(triton_kernels, KERNELS[name])


def _compile(
    function: Any,
    signature: dict[str, str],
    constants: dict[tuple[int], Any],
    attributes: dict[tuple[int], list],
    sm: int,
    options: dict[str, int],
) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.errors import PTXASError

    source = ASTSource(function, signature, constants, attributes)
    # Triton prints what ptxas refuses, before it raises; the reason stands in the error.
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            return triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)
        except PTXASError as error:
            said = (" ".join(line.split()) for line in str(error).splitlines())
            reason = next(
                (line for line in said if "fatal :" in line or "error :" in line), "no reason given"
            )
            raise CrabError(
                f"the ptxas of triton {triton.__version__} refuses the kernel for sm_{sm} ({reason}); "
                "run `pip install -U torch triton` (3.9 knows every card that kernels are made for)"
            ) from None


def _check_hidden(ptx: str, visible: int) -> None:
    """CrabError unless the entry has HIDDEN parameters behind the `visible` ones, and nothing reads them."""
    found = re.findall(r"\.param\s+\.\w+(?:\s+\.ptr[^,\n]*)?\s+(\w+_param_\d+)", ptx)
    loads = set(re.findall(r"ld\.param\S*\s+[^,]+,\s*\[(\w+_param_\d+)", ptx))
    if len(found) != visible + HIDDEN:
        raise CrabError(f"the PTX has {len(found)} parameters, expected {visible} and {HIDDEN} hidden ones")
    read = sorted(loads & set(found[visible:]))
    if read:
        raise CrabError(
            f"the kernel reads Triton's scratch memory ({', '.join(read)}), which nobody gives it"
        )
