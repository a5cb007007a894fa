"""Writing single graphs of the tiny model and running them in ONNX Runtime."""

import numpy as np
import onnx
import onnxruntime
from crab_edge_calibration import QuantisationReport
from crab_edge_export.audio import AudioExporter
from crab_edge_export.decoder import DecoderExporter
from crab_edge_export.graph import GraphBuilder
from crab_edge_export.linear import LinearWriter
from crab_edge_export.vision import VisionExporter
from crab_edge_export.weights import WeightStore

from crab_edge.lowbit import QTensor, dequantize

onnxruntime.set_default_logger_severity(3)


def write_decoder(tiny, precision, path, adapter=True, data=None):
    """The decoder graph at `path`; returns it, and the store it was written from (closed)."""
    with WeightStore(tiny.base, tiny.adapter if adapter else None) as weights:
        graph = GraphBuilder("decoder", data)
        linears = LinearWriter(graph, precision, QuantisationReport())
        DecoderExporter(graph, linears, weights, tiny.config.text_config, precision).write()
        graph.save(path)
    return path


def write_tower(tiny, name, precision, path, adapter_dir):
    """The vision or audio graph at `path`; returns the weight store, closed."""
    exporter, config = {
        "vision": (VisionExporter, tiny.config.vision_config),
        "audio": (AudioExporter, tiny.config.audio_config),
    }[name]
    with WeightStore(tiny.base, adapter_dir) as weights:
        graph = GraphBuilder(name)
        exporter(graph, LinearWriter(graph, precision, QuantisationReport()), weights, config).write()
        graph.save(path)
    return weights


def open_session(path):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


class Decoder:
    """A decoder graph with its cache bound in place."""

    def __init__(self, path, config, capacity=96, dtype=np.float32):
        self.session = open_session(path)
        depth = config.hidden_size // config.num_attention_heads
        shape = (1, config.num_key_value_heads, capacity, depth)
        self.cache = {
            f"{i}.{part}": np.full(shape, 7, dtype)
            for i in range(config.num_hidden_layers)
            for part in ("key", "value")
        }
        self.length = 0

    def __call__(self, embeds, positions):
        """embeds [S, H], positions [3, S]: appends; logits [V] of the last token."""
        self.length += len(embeds)
        binding = self.session.io_binding()
        for name, buffer in self.cache.items():
            value = onnxruntime.OrtValue.ortvalue_from_numpy(buffer)
            binding.bind_ortvalue_input(f"past.{name}", value)
            binding.bind_ortvalue_output(f"present.{name}", value)
        binding.bind_cpu_input("inputs_embeds", np.ascontiguousarray(embeds[None]))
        binding.bind_cpu_input("position_ids", np.ascontiguousarray(positions[:, None]))
        binding.bind_cpu_input("seqlens_k", np.array([self.length - 1], np.int32))
        binding.bind_cpu_input("total_sequence_length", np.array([self.length], np.int32))
        logits = np.empty((1, 1, self.session.get_outputs()[0].shape[2]), np.float32)
        binding.bind_ortvalue_output("logits", onnxruntime.OrtValue.ortvalue_from_numpy(logits))
        self.session.run_with_iobinding(binding)
        return logits[0, 0]


def low_bit_weights(path):
    """Every MatMulNBits and I-LoRA weight of a graph, dequantised, by the node's weight prefix."""
    graph = onnx.load(str(path)).graph
    arrays = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    out = {}
    for node in graph.node:
        attributes = {a.name: a.i for a in node.attribute}
        block = attributes.get("block_size", attributes.get("block"))
        if not block:
            continue
        name = next(i for i in node.input if i.endswith(".weight"))
        scales = arrays[name.replace(".weight", ".scales")]
        shape = (len(scales), attributes["K"])
        tensor = QTensor(arrays[name], scales, attributes["bits"], block, shape)
        out[name.removesuffix(".weight")] = dequantize(tensor)
    return out


def relative(actual, expected):
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)
