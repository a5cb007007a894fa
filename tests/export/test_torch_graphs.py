"""The torch engine's forwards on exported graphs, against ONNX Runtime on the same files (exact products)."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from crab_edge_export.precision import choose

from crab_edge.engines._torch_cache import Cache, Chunk
from crab_edge.engines._torch_decoder import Decoder as TorchDecoder
from crab_edge.engines._torch_step import Stepper
from crab_edge.engines._torch_towers import Audio, Vision
from crab_edge.engines._torch_weights import GraphReader
from crab_edge.errors import BundleError, EngineError
from crab_edge.features import FeatureConfig, audio_chunks
from tests.export.graphs import Decoder, open_session, relative, write_decoder, write_tower
from tests.tiny_model import MELS

TOKENS = 40
CPU = torch.device("cpu")
EXACT = {"block": 32, "accuracy_level": 0}
PRECISIONS = {
    "4 bits, two planes folded": choose(4, [], experts="residual4x2", **EXACT),
    "4 bits, one plane folded": choose(4, [], experts="plane4", **EXACT),
    "4 bits, unfolded": choose(4, [], experts="unfolded8", **EXACT),
    "4 bits, unfolded, other blocks": choose(4, [], experts="unfolded8", accuracy_level=0, block8=128),
    "8 bits, unfolded": choose(8, [], **EXACT),
    "float, folded": choose(32, []),
    "float, unfolded": replace(choose(32, []), folded=False),
}


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def inputs(tiny):
    """Embeddings [S, H] and positions [3, S] that differ on the axes."""
    rng = np.random.default_rng(0)
    embeds = rng.standard_normal((TOKENS, tiny.config.text_config.hidden_size)).astype(np.float32)
    steps = np.arange(TOKENS)
    return embeds, np.stack([steps // 3 * 2, steps % 7, steps % 5]).astype(np.int64) + 4


class Torch:
    """A decoder graph in torch with a cache: chunks, and single tokens by the step over fixed buffers."""

    def __init__(self, path, config, dtype=torch.float32, kv=torch.float32):
        self.depth = config.hidden_size // config.num_attention_heads
        model = SimpleNamespace(layers=config.num_hidden_layers, head_dim=self.depth)
        self.decoder = TorchDecoder(GraphReader(path, CPU, dtype), model)
        self.cache = Cache(model.layers, config.num_key_value_heads, self.depth, 2048, CPU, kv)
        self.cache.reserve(TOKENS, 0)
        self.step = Stepper(self.decoder, self.cache, config.hidden_size, config.vocab_size, CPU)

    def __call__(self, embeds, positions, begin=0):
        parts = torch.from_numpy(embeds), torch.from_numpy(positions)
        return self.decoder(*parts, Chunk(self.cache, begin, len(embeds))).numpy()


@pytest.fixture(params=PRECISIONS)
def precision(request):
    return PRECISIONS[request.param]


def test_decoder_equals_onnxruntime(tiny, inputs, tmp_path, precision):
    """At once, in chunks, and token by token."""
    path, config = write_decoder(tiny, precision, tmp_path / "d.onnx"), tiny.config.text_config
    embeds, positions = inputs
    theirs = Decoder(path, config)
    expected = [theirs(embeds[:36], positions[:, :36]).copy()]
    expected += [theirs(embeds[i : i + 1], positions[:, i : i + 1]).copy() for i in range(36, TOKENS)]
    ours = Torch(path, config)
    assert relative(ours(embeds, positions), expected[-1]) < 2e-5
    ours(embeds[:13], positions[:, :13])
    assert relative(ours(embeds[13:36], positions[:, 13:36], 13), expected[0]) < 2e-5
    for i, wanted in enumerate(expected[1:], 36):
        said = ours.step(embeds[i : i + 1], positions[:, i : i + 1], i)
        assert relative(said, wanted) < 2e-5
        assert relative(ours(embeds[i : i + 1], positions[:, i : i + 1], i), said) < 1e-5


@pytest.mark.parametrize(
    ("name", "adapter", "launches"),
    [
        ("4 bits, two planes folded", True, [1, 1, 1, 1]),
        ("4 bits, one plane folded", True, [1, 1, 1, 1]),
        ("4 bits, unfolded", True, [3, 1, 2, 1]),
        ("8 bits, unfolded", False, [1, 1, 1, 1]),
        ("float, folded", True, [3, 1, 2, 1]),
    ],
)
def test_linears_of_one_input_are_one_launch_where_they_can_be(tiny, tmp_path, name, adapter, launches):
    path = write_decoder(tiny, PRECISIONS[name], tmp_path / "d.onnx", adapter=adapter)
    groups = Torch(path, tiny.config.text_config).decoder.groups
    assert [len(group.linears) for group in groups] == 2 * launches
    for base in (group.linears[0].base for group in groups if group.linears[0].rows):
        # As the kernels read them.
        assert base.scales.stride() == (1, len(base.q))
    if adapter:
        assert [len(group.adapted) for group in groups] == 2 * [3, 1, 2, 1]


def test_a_decoder_without_an_adapter(tiny, inputs, tmp_path):
    path = write_decoder(tiny, PRECISIONS["4 bits, unfolded"], tmp_path / "d.onnx", adapter=False)
    ours, theirs = (kind(path, tiny.config.text_config) for kind in (Torch, Decoder))
    assert relative(ours(*inputs), theirs(*inputs)) < 2e-5
    assert all(group.route is None and group.adapted == () for group in ours.decoder.groups)


def test_float16_cache(tiny, inputs, tmp_path):
    path = write_decoder(tiny, choose(4, [], kv_dtype="float16", **EXACT), tmp_path / "d.onnx")
    expected = Decoder(path, tiny.config.text_config, dtype=np.float16)(*inputs)
    ours = Torch(path, tiny.config.text_config, kv=torch.float16)
    assert 1e-6 < relative(ours(*inputs), expected) < 2e-3
    said = ours.step(inputs[0][-1:], inputs[1][:, -1:], TOKENS - 1)
    assert 1e-6 < relative(said, expected) < 2e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_activations(tiny, inputs, tmp_path, dtype):
    """What a GPU computes in: close to float32, and really another type."""
    path = write_decoder(tiny, PRECISIONS["4 bits, two planes folded"], tmp_path / "d.onnx")
    exact = Torch(path, tiny.config.text_config)(*inputs)
    short = Torch(path, tiny.config.text_config, dtype, dtype)
    said = short(*inputs)
    assert said.dtype == np.float32 and short.cache.keys[0].dtype == dtype
    assert 1e-5 < relative(said, exact) < 3e-2


def test_the_step_compiles_whole(tiny, inputs, tmp_path):
    """One graph for all places: nothing in it depends on data, which a CUDA graph asks of it too."""
    path = write_decoder(tiny, PRECISIONS["4 bits, two planes folded"], tmp_path / "d.onnx")
    ours = Torch(path, tiny.config.text_config)
    ours(*inputs)
    compiled = torch.compile(ours.step.run, fullgraph=True, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for place in (TOKENS - 1, 7):
            wanted = ours.step(inputs[0][place : place + 1], inputs[1][:, place : place + 1], place).copy()
            ours.step.logits.zero_()
            compiled()
            assert relative(ours.step.logits.numpy(), wanted) < 1e-6


TOWERS = {
    "float": choose(32, []).tower(),
    "8 bits": choose(4, [], experts="unfolded8", accuracy_level=0).tower(),
}


@pytest.mark.parametrize("name", TOWERS)
@pytest.mark.parametrize("adapter", [True, False])
def test_vision_equals_onnxruntime(tiny, tmp_path, name, adapter):
    path = tmp_path / "vision.onnx"
    write_tower(tiny, "vision", TOWERS[name], path, tiny.adapter if adapter else None)
    pixels = np.random.default_rng(0).standard_normal((3 * 256, 1176)).astype(np.float32)
    (expected,) = open_session(path).run(["embeddings"], {"pixel_values": pixels})
    out = Vision(GraphReader(path, CPU, torch.float32))(torch.from_numpy(pixels)).numpy()
    assert out.shape == expected.shape and relative(out, expected) < 2e-5


@pytest.mark.parametrize("name", TOWERS)
@pytest.mark.parametrize("frames", [[199, 200], [4], [201, 37]])
def test_audio_equals_onnxruntime(tiny, tmp_path, name, frames):
    path = tmp_path / "audio.onnx"
    write_tower(tiny, "audio", TOWERS[name], path, tiny.adapter)
    rng = np.random.default_rng(0)
    parts = [
        audio_chunks(rng.standard_normal((MELS, count)).astype(np.float32), FeatureConfig(n_mels=MELS))
        for count in frames
    ]
    mel, lengths = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    (expected,) = open_session(path).run(["embeddings"], {"mel": mel, "lengths": lengths})
    out = Audio(GraphReader(path, CPU, torch.float32))(torch.from_numpy(mel), torch.from_numpy(lengths))
    assert out.shape == expected.shape and relative(out.numpy(), expected) < 2e-5


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    return write_decoder(tiny, PRECISIONS["8 bits, unfolded"], tmp_path_factory.mktemp("whole") / "d.onnx")


def changed(path, out, change):
    """A copy of the graph at `out`, with `change(graph)` made in it."""
    model = onnx.load(str(path))
    change(model.graph)
    onnx.save(model, str(out))
    return out


def test_graphs_of_another_form_are_refused(tiny, whole, tmp_path):
    config = tiny.config.text_config

    def another_norm(graph):
        next(node for node in graph.node if node.op_type.startswith("Skip")).op_type = "Softcap"

    def one_more(graph):
        graph.node.append(onnx.helper.make_node("Tanh", ["logits"], ["logits.capped"], name="logits.capped"))

    def one_less(graph):
        graph.node.remove(next(node for node in graph.node if node.op_type == "GroupQueryAttention"))

    for change, found in (
        (another_norm, "post_attention_layernorm is a Softcap"),
        (one_more, r"node logits.capped \(Tanh\)"),
        (one_less, r"attention is missing"),
    ):
        path = changed(whole, tmp_path / "d.onnx", change)
        with pytest.raises(
            EngineError, match=rf"written by crab-edge [\d.]+.*{found}.*export the model again"
        ):
            Torch(path, config)


def test_damaged_weights_are_refused(tiny, whole, tmp_path):
    def cut(graph):
        tensor = next(tensor for tensor in graph.initializer if tensor.name.endswith("o_proj.weight"))
        tensor.raw_data = tensor.raw_data[:-1]

    def gone(graph):
        graph.initializer.remove(next(t for t in graph.initializer if t.name.endswith("o_proj.scales")))

    def other_type(graph):
        next(t for t in graph.initializer if t.name.endswith("o_proj.scales")).data_type = 6

    for change, found in ((cut, "bytes, expected"), (gone, "no weight"), (other_type, "scales are int32")):
        path = changed(whole, tmp_path / "d.onnx", change)
        with pytest.raises(BundleError, match=f"d.onnx: damaged .*{found}"):
            Torch(path, tiny.config.text_config)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(BundleError, match="not a graph"):
        GraphReader(path, CPU, torch.float32)
    with pytest.raises(BundleError, match="can't be read"):
        GraphReader(tmp_path / "none.onnx", CPU, torch.float32)


def test_weights_of_a_data_file_stay_mapped(tiny, inputs, tmp_path):
    """The same logits as from one file; float weights are the mapped pages themselves."""
    precision = PRECISIONS["float, unfolded"]
    whole = Torch(write_decoder(tiny, precision, tmp_path / "d.onnx"), tiny.config.text_config)
    data = tmp_path / "apart.onnx.data"
    path = write_decoder(tiny, precision, tmp_path / "apart.onnx", data=data)
    apart = Torch(path, tiny.config.text_config)
    assert relative(apart(*inputs), whole(*inputs)) < 2e-6
    weight = apart.decoder.layers[0].o.linears[0].base.weight
    assert any(begin <= weight.data_ptr() < end for begin, end in mappings(data))
    before = data.read_bytes()
    weight.zero_()
    assert data.read_bytes() == before


def mappings(path):
    """Where this process has the file in its memory."""
    lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    places = [line.split(maxsplit=1)[0].split("-") for line in lines if line.endswith(str(path))]
    return [(int(begin, 16), int(end, 16)) for begin, end in places]
