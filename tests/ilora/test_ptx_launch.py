"""The PTX of the plugins launched as an engine launches it, against the operators' reference: on a GPU by the
driver, everywhere by `tests.ptx`.
"""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")
pytest.importorskip("onnx")

from crab_edge_calibration import quantize_rtn  # noqa: E402
from crab_edge_export.plugin_compile import compile_products  # noqa: E402
from crab_edge_export.plugin_nodes import Product  # noqa: E402

from tests.ptx import plugin  # noqa: E402

HALF = {"dtype": "float16", "scales": "float16"}
RANK, EXPERTS, GROUPS = 32, 3, 2
LINEAR = Product("ILoRALinearBias", n=200, k=128, k2=96, planes=2, bits=4, block=32, **HALF)
BESIDE = Product(
    "ILoRALinearExperts", n=200, k=128, k2=96, bits=4, block=32, bits2=8, block2=32, scales2="float16", **HALF
)
ADDED = Product("ILoRAExperts", n=200, k=96, bits=8, block=32, **HALF)
ROUTE = Product(
    "ILoRARoute", n=GROUPS * (RANK + EXPERTS), k=128, bits=8, block=32, rank=RANK, experts=EXPERTS,
    groups=GROUPS, **HALF,
)  # fmt: skip
PRODUCTS = {one.plugin: one for one in (LINEAR, BESIDE, ADDED, ROUTE)}
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def on_the_gpu(kernels, name, tactic, rows, inputs, out):
    from crab_edge.engines._cuda import Device
    from crab_edge.ilora.ptx_launch import Kernel

    device = Device(0)
    try:
        given = [device.allocate(np.ascontiguousarray(one).nbytes) for one in inputs]
        for one, memory in zip(inputs, given, strict=True):
            device.upload(np.ascontiguousarray(one), memory.address)
        device.synchronize()
        result = device.allocate(out.nbytes)
        kernel = Kernel(device, kernels, name, tactic)
        kernel.launch(rows, given, result)
        device.download(result.address, out)
        device.synchronize()
        kernel.close()
        for memory in (*given, result):
            memory.free()
    finally:
        device.close()
    return out


PLACES = {
    "machine": pytest.param(plugin.run, id="machine"),
    "gpu": pytest.param(on_the_gpu, id="gpu", marks=needs_gpu),
}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Kernels by capability, written and read as a package's are."""
    from crab_edge.ilora import plugin_kernels

    made = {}

    def get(place):
        sm = 87
        if place is on_the_gpu:
            from crab_edge.engines._cuda import driver

            sm = driver().gpus()[0].sm
        if sm not in made:
            folder = tmp_path_factory.mktemp(f"sm{sm}")
            compile_products(PRODUCTS.values(), sm).write(folder)
            made[sm] = plugin_kernels.read(folder)
        return made[sm]

    return get


def operands(product, rows):
    """Inputs in the plugin's order, and what the operator makes of them."""
    from crab_edge.ilora import torch_ops

    random = np.random.default_rng(0)

    def made(n, k, bits, block):
        q = quantize_rtn(random.normal(size=(n, k)).astype(np.float32), bits, block)
        return torch_ops.gpu_layout(q), torch_ops.prepare(q, "cpu")

    def drawn(*shape):
        return random.normal(size=shape).astype(np.float16)

    one = product
    layout, w = made(one.n, one.k + one.planes * one.k2, one.bits, one.block)
    x = drawn(rows, one.k)
    given, tensor = [x], torch.from_numpy
    if one.plugin == "ILoRARoute":
        expected = torch_ops.ilora_route(
            tensor(x), w.q, w.scales, one.bits, one.block, one.rank, one.experts, one.groups
        )
        return [*given, layout.q, layout.scales], expected
    if one.plugin == "ILoRAExperts":
        y0 = drawn(rows, one.n)
        expected = torch_ops.ilora_experts(tensor(y0), tensor(x), w.q, w.scales, one.bits, one.block)
        return [y0, x, layout.q, layout.scales], expected
    z = drawn(rows, one.k2)
    given += [z, layout.q, layout.scales]
    if one.bits2:
        beside, e = made(one.n, one.k2, one.bits2, one.block2)
        expected = torch_ops.lowbit_linear_experts(
            tensor(x),
            tensor(z),
            w.q,
            w.scales,
            one.bits,
            one.block,
            e.q,
            e.scales,
            one.bits2,
            one.block2,
            None,
        )
        return [*given, beside.q, beside.scales], expected
    bias = drawn(one.n)
    expected = torch_ops.lowbit_linear(
        tensor(x), tensor(z), w.q, w.scales, one.bits, one.block, one.planes, tensor(bias)
    )
    return [*given, bias], expected


@pytest.mark.parametrize("place", PLACES.values())
@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize(
    ("tactic", "rows"), [("decode", 1), ("decode", 7), ("decode", 9), ("prefill", 1), ("prefill", 130)]
)
def test_engine_launches_agree_with_the_reference(place, name, tactic, rows, compiled):
    product = PRODUCTS[name]
    inputs, expected = operands(product, rows)
    out = np.zeros((rows, product.columns), np.float16)
    out = place(compiled(place), product.name, tactic, rows, inputs, out)
    reference = expected.numpy().astype(np.float32)
    np.testing.assert_allclose(out, reference, rtol=5e-3, atol=5e-3 * np.abs(reference).max())
