"""Kernels for a graph's plugin nodes: Triton's PTX for one capability, with how TensorRT launches it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

from crab_edge.errors import CrabError
from crab_edge.ilora.plugin_kernels import Kernels, KernelSet, Launch, digest, mismatch
from crab_edge.ilora.ptx import without_trailing

from .plugin_nodes import Product

ROWS: dict[Literal["decode", "prefill"], int] = {"decode": 1, "prefill": 512}
"""Rows that each tactic's tiles are chosen for."""
_KERNELS = {"ILoRARoute": "route", "ILoRAExperts": "experts"}


def compile_products(
    products: Iterable[Product], sm: int, progress: Callable[[str, float], None] = lambda what, share: None
) -> Kernels:
    """Compiles every product's decode and prefill kernel; about two seconds each.

    progress gets what is being compiled and the share that is done. Raises InputError for a capability that
    there are no kernels for, CrabError when a kernel couldn't be launched by an engine.
    """
    wanted = sorted(products, key=lambda one: one.name)
    sets, texts = [], {}
    for index, product in enumerate(wanted):
        progress(f"compiling {product.name}", index / len(wanted))
        launches, digests = {}, {}
        for tactic, rows in ROWS.items():
            launch, text = _compile(product, sm, rows)
            launches[tactic], texts[product.name, tactic] = launch, text
            digests[tactic] = digest(text)
        sets.append(
            KernelSet(
                name=product.name,
                plugin=product.plugin,
                types=product.types,
                columns=product.columns,
                launches=launches,
                sha256=digests,
            )
        )
    return Kernels(sets, texts)


def _compile(product: Product, sm: int, rows: int) -> tuple[Launch, str]:
    from crab_edge.ilora.triton_compile import compile_kernel

    made = compile_kernel(
        _KERNELS.get(product.plugin, "linear"),
        sm,
        constants=constants(product, rows),
        dtype=product.dtype,
        scales=product.scales,
        scales_beside=product.scales2 or "float16",
        bias=product.bias,
    )
    # Engines before TensorRT 11 pass what they know of and nothing behind it.
    text = without_trailing(made.ptx, made.hidden_parameters)
    launch = Launch(
        entry=made.entry,
        grid=((made.columns, 1), (None, made.programs), (None, 1)),
        threads=made.threads,
        shared=made.shared,
    )
    problem = mismatch(text, launch, len(product.types))
    if problem:
        raise CrabError(f"kernel {product.name} for sm_{sm} {problem}")
    return launch, text


def constants(product: Product, rows: int) -> dict[str, int]:
    """What the kernel of a product is compiled with, for `rows` rows of activations."""
    from crab_edge.ilora import triton_compile

    one = product
    if one.plugin == "ILoRARoute":
        return triton_compile.route_constants(
            rows, one.k, one.bits, one.block, rank=one.rank, experts=one.experts, groups=one.groups
        )
    if one.plugin == "ILoRAExperts":
        return triton_compile.experts_constants(rows, one.n, one.k, one.bits, one.block)
    return triton_compile.linear_constants(
        rows,
        one.n,
        one.k,
        one.bits,
        one.block,
        k2=one.k2,
        planes=one.planes,
        beside=(one.bits2, one.block2),
    )
