"""The quantised decoder in pieces: each layer a graph of its own over the bundle's bytes, one at a time.

The nodes, weights and kernels are those of `decoder.onnx`; only one layer is in memory. That is how a bundle
larger than the machine's memory is compared with its float model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from crab_edge.errors import EngineError

from .decoder import LAST_TOKEN, ROOT, DecoderExporter
from .graph import GraphBuilder
from .prompts import Prompt

Floats = NDArray[np.float32]
_TYPES = {"position_ids": TensorProto.INT64, "seqlens_k": TensorProto.INT32}
_TYPES["total_sequence_length"] = TensorProto.INT32


class Segments:
    """Runs prompts through the decoder that `decoder` wrote into `graph`, step by step.

    pieces: the graph of each of the decoder's steps; folder: where its data file lies.
    """

    def __init__(
        self, graph: GraphBuilder, decoder: DecoderExporter, pieces: Sequence[onnx.GraphProto], folder: Path
    ) -> None:
        self.graph = graph
        self.decoder = decoder
        self.pieces = pieces
        self.folder = folder

    def run(
        self,
        prompts: Sequence[Prompt],
        seen: Callable[[int, list[Floats]], None] = lambda i, rows: None,
        tick: Callable[[], None] = lambda: None,
    ) -> list[Floats]:
        """Logits [asked, V] of every prompt's own text.

        seen: called after every layer i but the last, with the hidden states [S, H] of the prompts.
        """
        layers = len(self.pieces) - 2
        turns = [f"{ROOT}.rotary_emb.{name}" for name in ("cos", "sin")]
        wanted = [*turns, self.decoder.carried(0)[0]]
        states: list[dict[str, NDArray[Any]]] = []
        with _opened(self, self.pieces[0], wanted) as run:
            for prompt in prompts:
                state: dict[str, NDArray[Any]] = {
                    "inputs_embeds": prompt.embeds[None],
                    "position_ids": prompt.positions[:, None],
                }
                states.append(state | run(state))
        for i in range(layers):
            last = i + 1 == layers
            wanted = list(self.decoder.carried(i + 1))[: 1 if last else 2]
            with _opened(self, self.pieces[i + 1], wanted) as run:
                for prompt, state in zip(prompts, states, strict=True):
                    out = run(state | self._cache(i, len(prompt.embeds)))
                    for name in self.decoder.carried(i):
                        del state[name]
                    state |= out
            if not last:
                seen(i, [state[wanted[1]][0] for state in states])
            tick()
        logits = []
        name = self.decoder.carried(layers)[0]
        with _opened(self, self.pieces[-1], ["logits"], given=[LAST_TOKEN]) as run:
            for prompt, state in zip(prompts, states, strict=True):
                rows = np.ascontiguousarray(state[name][:, -prompt.asked :])
                logits.append(run({LAST_TOKEN: rows})["logits"][0])
        return logits

    def _cache(self, i: int, tokens: int) -> dict[str, NDArray[Any]]:
        decoder = self.decoder
        dtype = np.float16 if decoder.cache_type == TensorProto.FLOAT16 else np.float32
        empty = np.zeros((1, decoder.kv_heads, tokens, decoder.depth), dtype)
        return {
            f"past.{i}.key": empty,
            f"past.{i}.value": empty.copy(),
            "seqlens_k": np.array([tokens - 1], np.int32),
            "total_sequence_length": np.array([tokens], np.int32),
        }


class _opened:
    """A session over one piece, as a function of named arrays; closed with the `with` block."""

    def __init__(
        self, owner: Segments, piece: onnx.GraphProto, outputs: Sequence[str], given: Sequence[str] = ()
    ) -> None:
        self._outputs = list(outputs)
        self._model = _cut(owner, piece, self._outputs, given)
        self._folder = owner.folder
        self._session: Any = None

    def __enter__(self) -> Callable[[dict[str, NDArray[Any]]], dict[str, NDArray[Any]]]:
        import onnxruntime

        onnxruntime.set_default_logger_severity(3)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        # A graph given as bytes has no folder of its own.
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(self._folder)
        )
        try:
            self._session = onnxruntime.InferenceSession(
                self._model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:
            raise EngineError(
                f"a written layer can't be opened: {' '.join(str(error).split())[:300]}"
            ) from None
        self._names = [entry.name for entry in self._session.get_inputs()]
        return self._run

    def __exit__(self, *unused: object) -> None:
        self._session = None

    def _run(self, values: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        feed = {name: values[name] for name in self._names}
        return dict(zip(self._outputs, self._session.run(self._outputs, feed), strict=True))


def _cut(
    owner: Segments, piece: onnx.GraphProto, outputs: Sequence[str], given: Sequence[str]
) -> onnx.ModelProto:
    """The piece as a model: what no node of it makes comes in as an input or a weight."""
    nodes = [node for node in piece.node if not set(node.output) & set(given)]
    made = {name for node in nodes for name in node.output}
    needed = dict.fromkeys(name for node in nodes for name in node.input if name and name not in made)
    weights = {name: tensor for name in needed if (tensor := owner.graph.tensor(name)) is not None}
    cache = owner.decoder.cache_type
    inputs = [
        helper.make_tensor_value_info(
            name, cache if name.startswith("past.") else _TYPES.get(name, TensorProto.FLOAT), None
        )
        for name in needed
        if name not in weights
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
    return owner.graph.model(helper.make_graph(nodes, "segment", inputs, ends, list(weights.values())))
