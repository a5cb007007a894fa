"""The two operators, run by ONNX Runtime through their bodies, against the float64 reference."""

import numpy as np
import pytest

from crab_edge.errors import CrabError
from crab_edge.ilora import reference
from crab_edge.lowbit import dequantize, pack, pad_columns

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

from crab_edge.ilora import onnx_functions as F  # noqa: E402

OUT = 40


def quantize(w, bits, block):
    """Plain round to nearest: how codes are chosen doesn't matter here."""
    blocks = pad_columns(w, block)
    zero = 1 << (bits - 1)
    scales = np.abs(blocks).max(axis=-1) / (zero - 1)
    scales[scales == 0] = 1
    codes = np.clip(np.round(blocks / scales[..., None]) + zero, 0, 2 * zero - 1).astype(np.uint8)
    return pack(codes, scales.astype(np.float32), bits, block, w.shape[1])


class Case:
    """A group of `groups` linears over K inputs, with its float matrices and one file per `bits`."""

    def __init__(self, K, rank, experts, groups, bits, block, seed=0):
        rng = np.random.default_rng(seed)
        self.K, self.rank, self.experts, self.groups, self.bits, self.block = (
            K,
            rank,
            experts,
            groups,
            bits,
            block,
        )
        draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
        self.A = [draw(rank, K) / 8 for _ in range(groups)]
        self.R = [draw(experts, K) / 4 for _ in range(groups)]
        self.B = [draw(OUT, rank) for _ in range(experts)]
        self.scale = 2.0
        self.AR = F.stack_routes(self.A, self.R)
        self.sB = F.concat_experts(self.B, self.scale)
        self.initializers = []
        if bits == F.FLOAT:
            self._add("AR", self.AR)
            self._add("B", self.sB)
        else:
            for name, w in (("AR", self.AR), ("B", self.sB)):
                t = quantize(w, bits, block)
                self._add(name, t.q)
                self._add(f"{name}_scale", t.scales)
                w[...] = dequantize(t)
            # The reference computes with what the file holds.
            rows = self.AR.reshape(groups, rank + experts, K)
            self.A, self.R = list(rows[:, :rank]), list(rows[:, rank:])
            self.B = [self.sB[:, i * rank : (i + 1) * rank] / self.scale for i in range(experts)]

    def _add(self, name, array):
        self.initializers.append(onnx.numpy_helper.from_array(array, name))

    def model(self):
        low = [] if self.bits == F.FLOAT else ["AR_scale"]
        kind = {"bits": self.bits, "block": self.block}
        z_size = self.experts * self.rank
        nodes = [
            F.route_node(
                ["x", "AR", *low],
                "z",
                K=self.K,
                rank=self.rank,
                experts=self.experts,
                groups=self.groups,
                **kind,
            ),
            onnx.helper.make_node("Slice", ["z", "from", "to", "axis"], ["z_last"]),
            F.experts_node(
                ["y0", "z_last", "B", *(["B_scale"] if low else [])], "y", K=z_size, N=OUT, **kind
            ),
        ]
        for name, value in (("from", -z_size), ("to", 1 << 30), ("axis", 2)):
            self._add(name, np.array([value]))
        value = onnx.helper.make_tensor_value_info
        graph = onnx.helper.make_graph(
            nodes,
            "g",
            [value("x", 1, ["b", "s", self.K]), value("y0", 1, ["b", "s", OUT])],
            [value("z", 1, ["b", "s", self.groups * z_size]), value("y", 1, ["b", "s", OUT])],
            self.initializers,
        )
        return onnx.helper.make_model(
            graph, opset_imports=F.opset_imports(), functions=F.functions(self.bits), ir_version=10
        )

    def check(self, session, tokens, batch=1):
        rng = np.random.default_rng(tokens)
        x = rng.standard_normal((batch, tokens, self.K)).astype(np.float32)
        y0 = rng.standard_normal((batch, tokens, OUT)).astype(np.float32)
        z, y = session.run(None, {"x": x, "y0": y0})
        z_true = reference.route(x, self.A, self.R)
        y_true = reference.experts(y0, z_true[..., -self.experts * self.rank :], self.B, self.scale)
        for ours, truth in ((z, z_true), (y, y_true)):
            assert ours.shape == truth.shape
            assert np.abs(ours - truth).max() <= 1e-5 * np.abs(truth).max()


def open_session(model, **options):
    settings = ort.SessionOptions()
    settings.log_severity_level = 3
    for name, value in options.items():
        setattr(settings, name, value)
    return ort.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize(
    ("K", "rank", "experts", "groups", "bits", "block"),
    [
        (64, 32, 3, 1, 8, 32),
        (100, 8, 3, 2, 8, 32),
        (45, 4, 2, 3, 4, 16),
        (171, 16, 3, 3, 8, 64),
        (128, 5, 4, 2, 4, 128),
        (33, 1, 1, 1, 8, 16),
        (50, 8, 3, 3, 32, 0),
    ],
)
def test_bodies_equal_the_reference(K, rank, experts, groups, bits, block):
    case = Case(K, rank, experts, groups, bits, block)
    model = case.model()
    onnx.checker.check_model(model)
    session = open_session(model)
    for tokens, batch in ((1, 1), (3, 1), (7, 1), (5, 2)):
        case.check(session, tokens, batch)


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_a_route_costs_seven_nodes(groups, tmp_path):
    path = tmp_path / "optimised.onnx"
    open_session(Case(64, 32, 3, groups, 8, 32).model(), optimized_model_filepath=str(path))
    kinds = [node.op_type for node in onnx.load(path).graph.node]
    route = kinds[: kinds.index("Slice")]
    assert route == ["MatMulNBits", "Reshape", "Split", "Softmax", "Reshape", "Mul", "Reshape"]


def test_half_precision_files_route_in_fp32():
    """Logits of +-30 and a half-precision file: the weights are those of an fp32 softmax, rounded once."""
    rank, experts, K = 4, 3, 16
    rng = np.random.default_rng(0)
    A = [(rng.integers(-8, 9, (rank, K)) / 64).astype(np.float16)]
    R = [(rng.integers(-8, 9, (experts, K)) / 4).astype(np.float16)]
    x = rng.integers(-2, 3, (1, 6, K)).astype(np.float16)
    node = F.route_node(["x", "AR"], "z", K=K, rank=rank, experts=experts, groups=1, bits=F.FLOAT)
    half = onnx.TensorProto.FLOAT16
    graph = onnx.helper.make_graph(
        [node],
        "g",
        [onnx.helper.make_tensor_value_info("x", half, [1, 6, K])],
        [onnx.helper.make_tensor_value_info("z", half, [1, 6, experts * rank])],
        [onnx.numpy_helper.from_array(F.stack_routes(A, R).astype(np.float16), "AR")],
    )
    model = onnx.helper.make_model(
        graph, opset_imports=F.opset_imports(), functions=F.functions(F.FLOAT), ir_version=10
    )
    (z,) = open_session(model).run(None, {"x": x})
    assert z.dtype == np.float16
    np.testing.assert_allclose(z, reference.route(x, A, R), rtol=2e-3, atol=1e-6)


def test_attributes_are_scalars():
    case = Case(64, 32, 3, 3, 8, 32)
    for node in case.model().graph.node:
        if node.domain == F.DOMAIN:
            assert {a.type for a in node.attribute} == {onnx.AttributeProto.INT}


def test_row_order_of_a_group():
    A = [np.full((2, 4), i, np.float32) for i in (1, 2)]
    R = [np.full((3, 4), -i, np.float32) for i in (1, 2)]
    np.testing.assert_array_equal(F.stack_routes(A, R)[:, 0], [1, 1, -1, -1, -1, 2, 2, -2, -2, -2])
    B = [np.full((5, 2), i, np.float32) for i in (1, 2, 3)]
    np.testing.assert_array_equal(F.concat_experts(B, 2.0)[0], [2, 2, 4, 4, 6, 6])


def test_what_does_not_fit_is_refused():
    with pytest.raises(CrabError, match="one shape"):
        F.stack_routes([np.zeros((2, 4)), np.zeros((3, 4))], [np.zeros((3, 4))] * 2)
    with pytest.raises(CrabError, match="takes 3 inputs"):
        F.route_node(["x", "AR"], "z", K=4, rank=2, experts=3, groups=1, bits=8, block=16)
    with pytest.raises(CrabError, match="6 bits"):
        F.functions(6)
