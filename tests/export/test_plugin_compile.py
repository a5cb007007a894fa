"""Kernels as an engine would launch them: NVIDIA's layer hands TensorRT the grid of the Triton launcher, the
PTX takes exactly what TensorRT passes, and ptxas takes the PTX.
"""

from __future__ import annotations

import subprocess

import numpy as np
import pytest
import triton
from crab_edge_calibration import quantize_rtn
from crab_edge_export import targets
from crab_edge_export.plugin_compile import ROWS, compile_products, constants
from crab_edge_export.plugin_nodes import Product

from crab_edge.errors import InputError
from crab_edge.ilora import ptx, tensorrt_plugins
from tests.ilora.tensorrt_layer import LAYER, Built, library, loaded

triton_compile = pytest.importorskip("crab_edge.ilora.triton_compile")
pytest.importorskip("triton")

HALF = {"dtype": "float16", "scales": "float16"}
PRODUCTS = {
    "folded": Product("ILoRALinearBias", n=96, k=64, k2=48, planes=2, bits=4, block=16, **HALF),
    "plain": Product("LowBitLinear", n=100, k=200, bits=8, block=128, **HALF),
    "beside": Product(
        "ILoRALinearExperts",
        n=64,
        k=96,
        k2=48,
        bits=4,
        block=32,
        bits2=8,
        block2=16,
        scales2="float32",
        **HALF,
    ),
    "experts": Product("ILoRAExperts", n=80, k=48, bits=8, block=16, dtype="bfloat16", scales="float16"),
    "route": Product("ILoRARoute", n=70, k=64, bits=8, block=32, rank=32, experts=3, groups=2, **HALF),
}
_NAMES = {"float16": "HALF", "bfloat16": "BF16", "float32": "FLOAT", "int8": "INT8"}


# Compiling takes two seconds a kernel.
COMPILED = [PRODUCTS[name] for name in ("folded", "experts", "route")]


@pytest.fixture(scope="module")
def kernels():
    return compile_products(COMPILED, 87)


def test_targets_know_which_kernels_there_are():
    assert set(targets.KERNEL_SMS) == set(triton_compile.ARCHITECTURES)


def test_every_kernel_takes_what_tensorrt_passes(kernels):
    assert set(kernels.sets) == {one.name for one in COMPILED}
    for (name, tactic), text in kernels.ptx.items():
        kernel, one = ptx.entry(text), kernels.sets[name]
        assert kernel.kinds == ("pointer",) * len(one.types) + ("u32", "pointer")
        assert (kernel.target, kernel.version) == ("sm_87", 85)
        assert kernel.threads == one.launches[tactic].threads
        assert one.launches[tactic].arguments == ("rows",)


def test_ptxas_takes_what_is_left_of_the_parameters(kernels, tmp_path):
    source = tmp_path / "kernel.ptx"
    for key in ((PRODUCTS["folded"].name, "decode"), (PRODUCTS["route"].name, "prefill")):
        source.write_text(kernels.ptx[key], encoding="utf-8")
        command = [
            triton.knobs.nvidia.ptxas.path,
            "--gpu-name",
            "sm_87",
            "-o",
            str(tmp_path / "kernel.cubin"),
            str(source),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


@pytest.mark.skipif(LAYER is None, reason="tensorrt-cu13-bindings isn't installed")
def test_tensorrt_gets_the_launcher_s_grid(kernels):
    """At the rows of each tactic the Triton launcher itself would take this grid and these constants."""
    trt = library()
    with loaded(trt):
        tensorrt_plugins.register(kernels, trt)
        for product in COMPILED:
            kinds = [_NAMES[kind] for kind in product.types]
            # Only the first input's shape matters: its leading axes are the rows.
            built = Built(trt, product.plugin, product.name, kinds, [(1, None, 8)] * len(kinds))
            assert built.output_dims[-1].value(3) == product.columns
            for tactic, (name, rows) in enumerate(ROWS.items(), 1):
                entry, text, grid, threads, shared, scalars = built.kernel(tactic)
                expected = constants(product, rows)
                assert text.decode() == kernels.ptx[product.name, name]
                assert entry == ptx.entry(text.decode()).name
                assert threads == 32 * expected["WARPS"] and shared <= 48 * 1024
                for m in (1, 5, 8, 9, 33, 64, 65, 511, 512, 4096):
                    assert grid(m) == launcher_grid(product, expected, m)
                    assert scalars(m) == (m,)


def launcher_grid(product: Product, expected: dict, m: int) -> tuple[int, int, int]:
    """The grid of `crab_edge.ilora.triton_launch` with these tiles."""
    columns = -(-m // expected["BM"])
    if product.groups:
        return columns, product.groups * -(-product.rank // expected["BA"]), 1
    return columns, -(-product.n // expected["BN"]), 1


@pytest.mark.parametrize("name", sorted(PRODUCTS))
@pytest.mark.parametrize("rows", [1, 8, 64, 512])
def test_the_launcher_takes_the_same_constants_and_grid(name, rows, monkeypatch):
    """What `torch_ops` launches for such tensors, caught before Triton is asked to run it."""
    torch = pytest.importorskip("torch")
    from crab_edge.ilora import torch_ops, triton_launch

    product, caught = PRODUCTS[name], {}

    class Caught:
        def __getitem__(self, grid):
            return lambda *arguments, **given: caught.update(grid=grid, given=given)

    for kernel in ("linear_kernel", "experts_kernel", "route_kernel"):
        monkeypatch.setattr(triton_launch, kernel, Caught())

    def weight(n, k, bits, block):
        made = quantize_rtn(np.random.default_rng(0).normal(size=(n, k)).astype(np.float32), bits, block)
        found = torch_ops.prepare(made, "cpu")
        return found.q, found.scales, bits, block

    x = torch.zeros(rows, product.k, dtype=torch.float16)
    if product.plugin == "ILoRARoute":
        q = weight(product.n, product.k, product.bits, product.block)
        triton_launch.route(x, *q, product.rank, product.experts, product.groups)
    elif product.plugin == "ILoRAExperts":
        q = weight(product.n, product.k, product.bits, product.block)
        triton_launch.experts(torch.zeros(rows, product.n, dtype=torch.float16), x, *q)
    else:
        total = product.k + product.planes * product.k2
        q = weight(product.n, total, product.bits, product.block)
        z = torch.zeros(rows, product.k2, dtype=torch.float16) if product.k2 else None
        beside = weight(product.n, product.k2, product.bits2, product.block2) if product.bits2 else None
        triton_launch.linear(x, z, *q, product.planes, None, beside=beside)
    expected = constants(product, rows)
    assert {key: caught["given"][key] for key in expected if key != "WARPS"} == {
        key: value for key, value in expected.items() if key != "WARPS"
    }
    assert caught["given"]["num_warps"] == expected["WARPS"]
    assert (*caught["grid"], 1) == launcher_grid(product, expected, rows)


def test_a_capability_without_kernels_is_refused():
    with pytest.raises(InputError, match="no kernels for sm_75"):
        compile_products([PRODUCTS["plain"]], 75)
