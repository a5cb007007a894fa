"""The PTX of the plugins launched as an engine launches it, on a GPU, against the operators' reference."""

from __future__ import annotations

import numpy as np
import pytest
from crab_edge_calibration import quantize_rtn
from crab_edge_export.plugin_compile import compile_products
from crab_edge_export.plugin_nodes import Product

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("tactic", ["decode", "prefill"])
@pytest.mark.parametrize("rows", [1, 7, 9, 130])
def test_engine_launches_agree_with_the_reference(tactic, rows, tmp_path):
    from crab_edge.engines._cuda import Device, driver
    from crab_edge.ilora import plugin_kernels, torch_ops
    from crab_edge.ilora.ptx_launch import Kernel

    half = {"dtype": "float16", "scales": "float16"}
    rank, experts, groups = 32, 3, 2
    linear = Product("ILoRALinearBias", n=200, k=128, k2=96, planes=2, bits=4, block=32, **half)
    route = Product(
        "ILoRARoute", n=groups * (rank + experts), k=128, bits=8, block=32, rank=rank, experts=experts,
        groups=groups, **half,
    )  # fmt: skip
    compile_products([linear, route], driver().gpus()[0].sm).write(tmp_path)
    kernels = plugin_kernels.read(tmp_path)
    random = np.random.default_rng(0)
    made = {
        one.name: quantize_rtn(
            random.normal(size=(one.n, one.k + one.planes * one.k2)).astype(np.float32), one.bits, one.block
        )
        for one in (linear, route)
    }
    x, z = (random.normal(size=(rows, k)).astype(np.float16) for k in (linear.k, linear.k2))
    bias = random.normal(size=linear.n).astype(np.float16)
    weights = {name: torch_ops.prepare(weight, "cpu") for name, weight in made.items()}
    w, r = weights[linear.name], weights[route.name]
    xt, zt, bt = map(torch.from_numpy, (x, z, bias))
    expected = {
        linear.name: torch_ops.lowbit_linear(xt, zt, w.q, w.scales, 4, 32, 2, bt),
        route.name: torch_ops.ilora_route(xt, r.q, r.scales, 8, 32, rank, experts, groups),
    }
    device = Device(0)

    def put(value):
        data = np.ascontiguousarray(value)
        memory = device.allocate(data.nbytes)
        device.upload(data, memory.address)
        device.synchronize()
        return memory

    for product, given in ((linear, (x, z)), (route, (x,))):
        layout = torch_ops.gpu_layout(made[product.name])
        inputs = [put(one) for one in (*given, layout.q, layout.scales, *([bias] if product.bias else []))]
        out = np.zeros((rows, product.columns), np.float16)
        memory = device.allocate(out.nbytes)
        kernel = Kernel(device, kernels, product.name, tactic)
        kernel.launch(rows, inputs, memory)
        device.download(memory.address, out)
        device.synchronize()
        kernel.close()
        reference = expected[product.name].numpy().astype(np.float32)
        np.testing.assert_allclose(out, reference, rtol=5e-3, atol=5e-3 * np.abs(reference).max())
    device.close()
