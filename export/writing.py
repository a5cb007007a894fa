"""The files of a bundle, step by step: what an earlier run finished is taken over, the rest is written."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from crab_edge_calibration import LinearError, QuantisationReport, quantize_rows

from crab_edge.features import FeatureConfig
from crab_edge.memory import give_back

from .audio import AudioExporter
from .decoder import ROOT, DecoderExporter
from .graph import GraphBuilder, Piece
from .linear import LinearWriter, Moments, row_blocks
from .precision import Precision
from .vision import VisionExporter
from .weights import WeightStore
from .workspace import Workspace

Tick = Callable[[], None]
Hook = Callable[[str, str], None]
# Larger models keep their weights in a file beside the graph, which is mapped instead of read. (A model file
# couldn't hold 2 GB.)
EXTERNAL_PARAMETERS = 50_000_000
_EMBEDDING_WEIGHTS = 1 << 23
_NAMES = {"vision": "writing the vision encoder", "audio": "writing the audio encoder"}
_NAMES["decoder"] = "writing the decoder"


class Files:
    """Writes graphs and embedding into the work folder's bundle; `report` gets every weight's error."""

    def __init__(
        self,
        config: Any,
        weights: WeightStore,
        precision: Precision,
        report: QuantisationReport,
        work: Workspace,
    ) -> None:
        self.weights = weights
        self.precision = precision
        self.report = report
        self.work = work
        external = weights.n_parameters() > EXTERNAL_PARAMETERS
        self._graphs: dict[str, tuple[GraphBuilder, LinearWriter, Any]] = {}
        # The encoders first: the decoder's moments come last.
        for name in ("vision", "audio", "decoder"):
            at = precision if name == "decoder" else precision.tower()
            builder = GraphBuilder(name, work.bundle / f"{name}.onnx.data" if external else None)
            linears = LinearWriter(builder, at, report)
            exporter: Any
            if name == "decoder":
                exporter = DecoderExporter(builder, linears, weights, config.text_config, at)
            elif name == "vision":
                exporter = VisionExporter(builder, linears, weights, config.vision_config)
            else:
                exporter = AudioExporter(builder, linears, weights, config.audio_config)
            self._graphs[name] = (builder, linears, exporter)
        self._kept = {name: self._verified(name) for name in self._graphs}

    @property
    def steps(self) -> int:
        """How many steps there are, finished ones too."""
        return sum(len(exporter.units()) for _, _, exporter in self._graphs.values()) + 1

    def finished(self, graph: str, kind: str) -> int:
        """How many steps of a kind ("layer") an earlier run finished."""
        units = self._graphs[graph][2].units()[: self._kept[graph]]
        return sum(name.split()[0] == kind for name, _ in units)

    def _verified(self, graph: str) -> int:
        """Leading steps whose files are as the journal says. Later ones stand on them and don't count."""
        units = self._graphs[graph][2].units()
        for count, (step, _) in enumerate(units):
            if self.work.entry(f"{graph} {step}") is None:
                for later, _ in units[count:]:
                    self.work.forget(f"{graph} {later}")
                return count
        return len(units)

    def write(
        self,
        moments: Moments,
        tick: Callable[[str], Tick],
        before: Hook = lambda graph, step: None,
        after: Hook = lambda graph, step: None,
    ) -> None:
        """All graphs and the embedding. before, after: called around each step that isn't there yet."""
        for name, (builder, linears, exporter) in self._graphs.items():
            linears.moments = moments
            done = tick(_NAMES[name])
            for number, (step, make) in enumerate(exporter.units()):
                key = f"{name} {step}"
                note = self.work.entry(key) if number < self._kept[name] else None
                if note is None:
                    before(name, step)
                    self._make(key, builder, make)
                    after(name, step)
                else:
                    self._take_over(key, builder, note)
                done()
            builder.save(self.work.bundle / f"{name}.onnx")
        self._embedding(tick("writing the embedding"))

    def _make(self, key: str, builder: GraphBuilder, make: Callable[[], None]) -> None:
        errors = len(self.report.linears)
        make()
        piece = builder.piece()
        # A layer's large arrays come and go; what is between them would hold their memory back.
        give_back()
        files = self.work.keep(_piece_file(key), piece.graph.SerializeToString())
        if builder.data_path is not None and piece.end > piece.begin:
            name = builder.data_path.relative_to(self.work.folder).as_posix()
            files[name] = (piece.begin, piece.end, piece.sha256)
        note = {
            "begin": piece.begin,
            "end": piece.end,
            "errors": [asdict(error) for error in self.report.linears[errors:]],
        }
        self.work.done(key, note, files)

    def _take_over(self, key: str, builder: GraphBuilder, note: dict[str, Any]) -> None:
        builder.replay(Piece(self._piece(key), note["begin"], note["end"], ""))
        self.report.linears += [LinearError(**error) for error in note["errors"]]

    def _piece(self, key: str) -> onnx.GraphProto:
        graph = onnx.GraphProto()
        graph.ParseFromString((self.work.folder / _piece_file(key)).read_bytes())
        return graph

    def decoder(self) -> tuple[GraphBuilder, DecoderExporter, list[onnx.GraphProto]]:
        """The decoder as it was written, and the graph of each of its steps."""
        builder, _, exporter = self._graphs["decoder"]
        return builder, exporter, [self._piece(f"decoder {step}") for step, _ in exporter.units()]

    def _embedding(self, tick: Tick) -> None:
        path, name = self.work.bundle / "embedding.bin", f"{ROOT}.embed_tokens.weight"
        if self.work.entry("embedding") is None:
            step = max(1, _EMBEDDING_WEIGHTS // self.weights.shape(name)[1])
            scales: list[np.ndarray] = []
            digest = hashlib.sha256()
            with path.open("wb") as file:

                def put(part: np.ndarray) -> None:
                    content = np.ascontiguousarray(part).reshape(-1).view(np.uint8)
                    digest.update(content)
                    file.write(content)

                for block in row_blocks(self.weights, name, step):
                    if self.precision.embedding_bits == 32:
                        put(block)
                        continue
                    codes, scale = quantize_rows(block)
                    put(codes)
                    scales.append(scale)
                for scale in scales:
                    put(scale)
                file.flush()
                os.fsync(file.fileno())
            where = path.relative_to(self.work.folder).as_posix()
            files = {where: (0, path.stat().st_size, digest.hexdigest())}
            self.work.done("embedding", files=files)
        tick()

    def finish(self, model_dir: Path, features: FeatureConfig) -> None:
        """The small files."""
        shutil.copyfile(model_dir / "tokenizer.json", self.work.bundle / "tokenizer.json")
        features.save(self.work.bundle / "features.json")


def _piece_file(key: str) -> str:
    return f"steps/{key.replace(' ', '.')}.onnx"
