"""Operators of the files for TensorRT, as functions with bodies in standard ONNX.

TensorRT's parser chooses an importer by an operator's name alone, whatever its domain, and prefers its own
importer to a function's body. So `crab::TensorScatter` and `crab::Attention`, named after operators of ONNX
opset 24 and 23, become the layers that update a KV cache in place and that fuse attention, while ONNX Runtime
takes the bodies and the file stays at opset 21. `crab::ILoRARoute` and `crab::ILoRAExperts` are I-LoRA's
operators (`crab_edge.ilora.onnx_functions`) over float weights, K before N:

    ILoRARoute(x [B, S, K], AR [K, groups*(rank+experts)]) -> z [B, S, groups*experts*rank]
    ILoRAExperts(y0 [B, S, N], z [B, S, K], B [K, N]) -> y = y0 + z B

AR and B come out of a DequantizeLinear before the node: the parser gives that of a body the same layer name
each time, and refuses the second. `z_shape` is z's shape, one axis of it -1: a shape that the body computed
would cost the builder more than the operator itself.
"""

from __future__ import annotations

import onnx.parser
from onnx import FunctionProto

from crab_edge.ilora.onnx_functions import DOMAIN, EXPERTS, ROUTE

ATTENTION, SCATTER = "Attention", "TensorScatter"
_LOWEST = "-3.4028234e38"


def _function(text: str) -> FunctionProto:
    return onnx.parser.parse_function(f'<domain: "{DOMAIN}", opset_import: ["" : 21]>\n{text}')


def scatter() -> FunctionProto:
    """TensorScatter(past [B, H, Smax, D], update [B, H, S, D], write int64 [1]) -> present.

    `update` takes the S places from `write` on; the rest is `past`.
    """
    return _function(
        f"""
        {SCATTER} (past, update, write) => (present) {{
            shape = Shape (update)
            two = Constant <value = int64 {{2}}> ()
            zero = Constant <value = int64 {{0}}> ()
            one = Constant <value = int64 {{1}}> ()
            column = Constant <value = int64[4] {{1, 1, -1, 1}}> ()
            count = Gather (shape, two)
            steps = Range (zero, count, one)
            rows = Add (steps, write)
            rows_column = Reshape (rows, column)
            places = Expand (rows_column, shape)
            present = ScatterElements <axis = 2> (past, places, update)
        }}"""
    )


def attention(masked: bool) -> FunctionProto:
    """Attention(q [B, Hq, S, D], k, v [B, Hkv, L, D], mask) -> [B, Hq, S, D]; scores and softmax in float32.

    Hq / Hkv neighbouring heads of q share a head of k and v. mask: bool, true where q may look, [1, 1, S, L]
    or [B, 1, 1, L]. `scale` multiplies the scores. `TRT_decomposable` lets TensorRT take several kernels
    where it has no fused one.
    """
    lowest = f"lowest = Constant <value = float {{{_LOWEST}}}> ()"
    seen = f"{lowest}\nseen = Where (mask, scaled, lowest)"
    return _function(
        f"""
        {ATTENTION} <scale, TRT_decomposable> (q, k, v{", mask" if masked else ""}) => (y) {{
            q_shape = Shape (q)
            kv_heads = Shape <start = 0, end = 2> (k)
            q_rows = Shape <start = 0, end = 3> (q)
            k_rows = Shape <start = 2, end = 3> (k)
            depth = Shape <start = 3, end = 4> (q)
            rest = Constant <value = int64[1] {{-1}}> ()
            by_kv_head = Concat <axis = 0> (kv_heads, rest, depth)
            by_head = Concat <axis = 0> (q_rows, k_rows)
            weights_by_kv_head = Concat <axis = 0> (kv_heads, rest, k_rows)
            factor = Constant <value_float: float = @scale> ()
            q32 = Cast <to = 1> (q)
            k32 = Cast <to = 1> (k)
            v32 = Cast <to = 1> (v)
            q_grouped = Reshape (q32, by_kv_head)
            k_turned = Transpose <perm = [0, 1, 3, 2]> (k32)
            products = MatMul (q_grouped, k_turned)
            scores = Reshape (products, by_head)
            scaled = Mul (scores, factor)
            {seen if masked else "seen = Identity (scaled)"}
            weights = Softmax <axis = -1> (seen)
            weights_grouped = Reshape (weights, weights_by_kv_head)
            mixed = MatMul (weights_grouped, v32)
            y32 = Reshape (mixed, q_shape)
            y = CastLike (y32, q)
        }}"""
    )


def route(rank: int, experts: int) -> FunctionProto:
    """ILoRARoute for a file's rank and experts."""
    return _function(
        f"""
        {ROUTE} (x, AR) => (z) {{
            by_linear = Constant <value = int64[5] {{0, 0, -1, 1, {rank + experts}}}> ()
            as_column = Constant <value = int64[5] {{0, 0, 0, -1, 1}}> ()
            flat = Constant <value = int64[3] {{0, 0, -1}}> ()
            parts = Constant <value = int64[2] {{{rank}, {experts}}}> ()
            products = MatMul (x, AR)
            linears = Reshape (products, by_linear)
            h, logits = Split <axis = -1> (linears, parts)
            logits32 = Cast <to = 1> (logits)
            weights32 = Softmax <axis = -1> (logits32)
            weights = CastLike (weights32, h)
            g = Reshape (weights, as_column)
            outer = Mul (g, h)
            z = Reshape (outer, flat)
        }}"""
    )


def experts() -> FunctionProto:
    """ILoRAExperts."""
    return _function(
        f"""
        {EXPERTS} (y0, z, B) => (y) {{
            mixed = MatMul (z, B)
            y = Add (y0, mixed)
        }}"""
    )
