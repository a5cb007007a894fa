"""Running the files for TensorRT in ONNX Runtime."""

import numpy as np
import onnxruntime


def exact_session(path):
    """ONNX Runtime makes MatMulNBits of dequantised products, by default on int8 activations; not here."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


class HalfDecoder:
    """A decoder file for TensorRT with its float16 cache. Unlike the engine, a pass copies the cache."""

    filling = 7

    def __init__(self, path):
        self.session = exact_session(path)
        self.cache = {
            value.name.removeprefix("past."): np.full(value.shape, self.filling, np.float16)
            for value in self.session.get_inputs()
            if value.name.startswith("past.")
        }
        self.length = 0

    def __call__(self, embeds, positions):
        """embeds [S, H], positions [3, S]: appends; logits [V] of the last token."""
        self.length += len(embeds)
        feed = {f"past.{name}": buffer for name, buffer in self.cache.items()}
        feed |= {"inputs_embeds": embeds[None], "position_ids": positions[:, None]}
        feed["seqlens_k"] = np.array([self.length - 1], np.int32)
        names = [value.name for value in self.session.get_outputs()]
        out = dict(zip(names, self.session.run(None, feed), strict=True))
        self.cache = {name: out[f"present.{name}"] for name in self.cache}
        return out["logits"][0, 0]
