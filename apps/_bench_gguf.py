"""Random Qwen2 decoders and LoRA adapters as GGUF files, for llama.cpp: every layer with its own bytes.

The base is what llama.cpp calls Q4_0 (4 bits, blocks of 32, fp16 scales) with an 8-bit head; the adapter is
an ordinary LoRA in q8_0 on all seven linears, loaded beside the base and not merged. There is no tokenizer:
llama.cpp takes a vocabulary of dummy tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from crab_edge_apps._bench_decoder import DecoderShape

ARCHITECTURE = "qwen2"
#: Values that share a scale in both q4_0 and q8_0; an adapter's rank is a multiple of it.
BLOCK = 32
_NAMES = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}
_CODE_BYTES = {"Q4_0": 16, "Q8_0": 32}


@dataclass(frozen=True)
class _Tensor:
    """A tensor to come: its name, its shape [out, in] or [n], and its type in GGUF's names."""

    name: str
    shape: tuple[int, ...]
    kind: str

    @property
    def nbytes(self) -> int:
        values = int(np.prod(self.shape))
        return values * 4 if self.kind == "F32" else values // BLOCK * (2 + _CODE_BYTES[self.kind])


def write_base(shape: DecoderShape, path: Path, context: int) -> int:
    """The base at `path`; returns the bytes of it that a decode step reads (all but the embeddings)."""
    import gguf

    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    writer.add_name(f"random {shape.name}")
    writer.add_vocab_size(shape.vocab)
    writer.add_tokenizer_model("no_vocab")
    writer.add_context_length(context)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.intermediate)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(1e6)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    tensors = list(_base_tensors(shape))
    _write(writer, tensors)
    return sum(tensor.nbytes for tensor in tensors if not tensor.name.startswith("token_embd"))


def write_lora(shape: DecoderShape, path: Path, target_bytes: int) -> tuple[int, float]:
    """A LoRA adapter of about `target_bytes` at `path`; returns its bytes and its mean rank.

    Ranks are multiples of 32, what q8_0 stores of B's columns; where the rank that matches lies between two,
    linears take the one or the other so that the sum comes out right.
    """
    import gguf

    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(2 * BLOCK))
    tensors = list(_lora_tensors(shape, target_bytes))
    _write(writer, tensors)
    ranks = [tensor.shape[0] for tensor in tensors if tensor.name.endswith("lora_a")]
    return sum(tensor.nbytes for tensor in tensors), sum(ranks) / len(ranks)


def _base_tensors(shape: DecoderShape) -> Iterator[_Tensor]:
    yield _Tensor("token_embd.weight", (shape.vocab, shape.hidden), "Q8_0")
    for i in range(shape.layers):
        yield _Tensor(f"blk.{i}.attn_norm.weight", (shape.hidden,), "F32")
        yield _Tensor(f"blk.{i}.ffn_norm.weight", (shape.hidden,), "F32")
        for linear, (n, k) in shape.linears().items():
            yield _Tensor(f"blk.{i}.{_NAMES[linear]}.weight", (n, k), "Q4_0")
            if linear in ("q_proj", "k_proj", "v_proj"):
                yield _Tensor(f"blk.{i}.{_NAMES[linear]}.bias", (n,), "F32")
    yield _Tensor("output_norm.weight", (shape.hidden,), "F32")
    yield _Tensor("output.weight", (shape.vocab, shape.hidden), "Q8_0")


def _lora_tensors(shape: DecoderShape, target_bytes: int) -> Iterator[_Tensor]:
    widths = [(i, name, n, k) for i in range(shape.layers) for name, (n, k) in shape.linears().items()]
    scale = 1 + 2 / BLOCK
    rank = target_bytes / (scale * sum(n + k for *_, n, k in widths))
    wanted = written = 0.0
    for i, name, n, k in widths:
        wanted += rank * (n + k)
        chosen = max(1, round((wanted - written) / (n + k) / BLOCK)) * BLOCK
        written += chosen * (n + k)
        yield _Tensor(f"blk.{i}.{_NAMES[name]}.weight.lora_a", (chosen, k), "Q8_0")
        yield _Tensor(f"blk.{i}.{_NAMES[name]}.weight.lora_b", (n, chosen), "Q8_0")


def _write(writer: Any, tensors: list[_Tensor]) -> None:
    """Header first, then one tensor after the other: the file never has to fit in memory."""
    import gguf

    for tensor in tensors:
        kind = gguf.GGMLQuantizationType[tensor.kind]
        dtype = np.dtype(np.float32 if tensor.kind == "F32" else np.uint8)
        # Of quantised tensors the writer wants the shape in bytes.
        columns = tensor.nbytes // tensor.shape[0]
        shape = tensor.shape if tensor.kind == "F32" else (tensor.shape[0], columns)
        writer.add_tensor_info(tensor.name, shape, dtype, tensor.nbytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        writer.write_tensor_data(_values(tensor))
    writer.close()


def _values(tensor: _Tensor) -> NDArray[Any]:
    seed = int.from_bytes(hashlib.sha256(tensor.name.encode()).digest()[:8], "little")
    rng = np.random.default_rng(seed)
    if tensor.kind == "F32":
        if "norm" in tensor.name:
            return np.ones(tensor.shape, np.float32)
        return rng.normal(0, 0.02, tensor.shape).astype(np.float32)
    n, k = tensor.shape
    codes = _CODE_BYTES[tensor.kind]
    rows = np.frombuffer(rng.bytes(tensor.nbytes), np.uint8).reshape(n, k // BLOCK, 2 + codes).copy()
    # Uniform codes have a standard deviation of 2^bits / sqrt(12), and outputs should stay near 1.
    bits = 4 if tensor.kind == "Q4_0" else 8
    scales = np.sqrt(12.0 / k) / 2**bits * rng.uniform(0.9, 1.1, (n, k // BLOCK))
    rows[:, :, :2] = scales.astype("<f2").view(np.uint8).reshape(n, k // BLOCK, 2)
    return rows.reshape(n, -1)
