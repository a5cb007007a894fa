"""A model directory and an adapter -> a bundle: quantise, write graphs, compare with the float model."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from crab_edge_calibration import QuantisationReport, quantize_rows
from numpy.typing import NDArray

from crab_edge.bundle import Bundle, BundleWriter
from crab_edge.errors import DependencyError, InputError
from crab_edge.manifest import AdapterInfo, Manifest, ModelInfo, Recipe
from crab_edge.prompt import PromptBuilder

from . import parity
from .audio import AudioExporter
from .decoder import ROOT, DecoderExporter, decoder_widths, head_dim
from .examples import ExampleSet, Media, gather
from .graph import GraphBuilder
from .linear import LinearWriter
from .precision import KVType, Precision, choose
from .vision import VisionExporter
from .weights import WeightStore, canonical

Progress = Callable[[str, float], None]
Moments = dict[str, NDArray[np.float32]]
# Larger graphs keep their weights in a file beside them, which is mapped instead of read.
_EXTERNAL_PARAMETERS = 50_000_000
# Wider linears are calibrated with mean squares only: x x^T of all of them wouldn't fit in memory.
_FULL_MOMENT_WIDTH = 2048
METHODS = ("auto", "rtn")


def export_bundle(
    model_dir: Path | str,
    adapter_dir: Path | str | None,
    out: Path | str,
    *,
    bits: int = 4,
    block: int = 32,
    accuracy_level: int = 4,
    experts: str = "auto",
    kv_dtype: KVType = "float32",
    method: str = "auto",
    calibration_media: Media | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Quantise and export a float model to the bundle `out`, which is published whole or not at all.

    bits: 4, 8 or 32 (float graphs); block: weights per scale; accuracy_level: 4 computes products on int8
    activations, 0 on float32; experts: how an adapter's experts are stored (see `Precision`).
    method: "auto" rounds 4-bit weights with error feedback where the inputs are real, "rtn" to nearest.
    calibration_media: clips on which inputs are watched and the bundle is compared with the float model; of
    several clips the last quarter serves for comparing only. Without them the packaged clip or synthetic
    scenes are used, the latter for comparing only. The comparison goes into the manifest as `parity`.
    progress: called with what is being done and the share that is done, 0..1.
    Raises ModelError for directories that don't fit, InputError for options that don't, or if `out` exists.
    """
    if method not in METHODS:
        raise InputError(f"--method: expected one of {', '.join(METHODS)}, got {method!r}")
    job = _Job(Path(model_dir), None if adapter_dir is None else Path(adapter_dir), progress)
    with (
        WeightStore(job.model_dir, job.adapter_dir) as weights,
        BundleWriter(out, overwrite=overwrite) as writer,
    ):
        precision = job.precision(weights, bits, block, accuracy_level, experts, kv_dtype)
        calibration, comparison, held_out = gather(calibration_media, job.features).split()
        job.plan((len(calibration.examples) if held_out else 0) + 2 * len(comparison.examples))
        engine = _float_engine(job)
        side = parity.float_side(engine, job.prompt, job.features, job.model_info(weights))
        tick = job.tick("running the float model")
        with _watch(engine.model, method, calibration.inputs, bits) as seen:
            references = parity.reference(side, engine, calibration, tick)
        if held_out:
            references = parity.reference(side, engine, comparison, tick)
        del engine, side
        report = _write_files(job, weights, precision, {} if seen is None else seen.moments(), writer)
        manifest = Manifest(model=job.model_info(weights), recipe=_recipe(precision))
        measured = _compare(writer.preview(manifest), comparison, references, job)
        measured |= {
            "held_out": held_out,
            "calibrated_on": 0 if seen is None else len(calibration.examples),
            "weights": report.summary(),
        }
        return writer.commit(manifest.model_copy(update={"parity": measured}))


class _Job:
    """The inputs of one export, read and checked, and its progress."""

    def __init__(self, model_dir: Path, adapter_dir: Path | None, progress: Progress | None) -> None:
        from crab_edge.model import open_model_dir

        model = open_model_dir(model_dir)
        self.model_dir, self.adapter_dir = model_dir, adapter_dir
        self.config, self.card, self.features = model.config, model.card, model.features
        self.prompt = PromptBuilder(model.tokenizer_file, self.features)
        self._progress = progress
        self._done = 0
        text, sound = self.config.text_config, self.config.audio_config
        self._steps = text.num_hidden_layers + sound.encoder_layers + self.config.vision_config.depth

    def plan(self, more: int) -> None:
        """Steps to come beside the layers."""
        self._steps += more

    def tick(self, what: str) -> Callable[[], None]:
        """A callback for one finished step of `what`."""

        def step() -> None:
            self._done += 1
            if self._progress is not None:
                self._progress(what, min(1.0, self._done / self._steps))

        if self._progress is not None:
            self._progress(what, min(1.0, self._done / self._steps))
        return step

    def precision(
        self, weights: WeightStore, bits: int, block: int, accuracy_level: int, experts: str, kv_dtype: KVType
    ) -> Precision:
        adapter = weights.adapter_config
        ranks = int(adapter["r"]) * int(adapter["num_experts"]) if adapter else 0
        widths = decoder_widths(self.config.text_config, ranks) if adapter else []
        return choose(
            bits, widths, block=block, accuracy_level=accuracy_level, experts=experts, kv_dtype=kv_dtype
        )

    def model_info(self, weights: WeightStore) -> ModelInfo:
        """Identity and sizes; the adapter's zero linears are known only after they were written."""
        text, adapter = self.config.text_config, None
        if weights.adapter_config:
            adapter = AdapterInfo(
                rank=weights.adapter_config["r"],
                experts=weights.adapter_config["num_experts"],
                alpha=weights.adapter_config["lora_alpha"],
                adapted_linears=len(weights.adapted()),
                zero_linears=len(weights.zero_linears),
            )
        special = self.prompt.special
        return ModelInfo(
            name=self.card.name,
            hidden_size=text.hidden_size,
            vocab_size=text.vocab_size,
            layers=text.num_hidden_layers,
            kv_heads=text.num_key_value_heads,
            head_dim=head_dim(text),
            max_positions=text.max_position_embeddings,
            n_parameters=weights.n_parameters(),
            adapter=adapter,
            question_templates=self.card.question_templates,
            tasks=self.card.tasks,
            labels=self.card.labels,
            eos_ids=sorted({special.im_end, special.pad}),
        )


def _float_engine(job: _Job) -> Any:
    """The float model in torch; loading it also checks every weight's name and shape."""
    from crab_edge.engines.torch import TorchEngine

    return TorchEngine.load(job.model_dir, job.adapter_dir)


def _watch(model: Any, method: str, inputs: str, bits: int) -> AbstractContextManager[Any]:
    """Statistics of the float model's inputs while it answers; none where they would be no use.

    Noise says nothing about which channels matter. The whole moment is kept where it pays (4-bit linears) and
    fits (widths up to `_FULL_MOMENT_WIDTH`).
    """
    if method == "rtn" or inputs == "synthetic" or bits == 32:
        return nullcontext()
    from crab_edge_calibration.statistics import input_moments

    def full(name: str, width: int) -> bool:
        return bits == 4 and canonical(name).startswith(f"{ROOT}.") and width <= _FULL_MOMENT_WIDTH

    return input_moments(model, full)


def _write_files(
    job: _Job, weights: WeightStore, precision: Precision, moments: Moments, writer: BundleWriter
) -> QuantisationReport:
    """Everything of the bundle but its manifest."""
    moments = {canonical(name): value for name, value in moments.items()}
    report = QuantisationReport()
    config = job.config
    external = weights.n_parameters() > _EXTERNAL_PARAMETERS

    def graph(name: str, at: Precision) -> tuple[GraphBuilder, LinearWriter]:
        builder = GraphBuilder(name, writer.path(f"{name}.onnx.data") if external else None)
        return builder, LinearWriter(builder, at, report, moments)

    builder, linears = graph("decoder", precision)
    decoder = DecoderExporter(builder, linears, weights, config.text_config, precision)
    decoder.write(job.tick("writing the decoder"))
    builder.save(writer.path("decoder.onnx"))
    builder, linears = graph("vision", precision.tower())
    VisionExporter(builder, linears, weights, config.vision_config).write(
        job.tick("writing the vision encoder")
    )
    builder.save(writer.path("vision.onnx"))
    builder, linears = graph("audio", precision.tower())
    AudioExporter(builder, linears, weights, config.audio_config).write(job.tick("writing the audio encoder"))
    builder.save(writer.path("audio.onnx"))

    table = weights.array(f"{ROOT}.embed_tokens.weight")
    with writer.path("embedding.bin").open("wb") as file:
        for part in (table,) if precision.embedding_bits == 32 else quantize_rows(table):
            file.write(np.ascontiguousarray(part).tobytes())
    shutil.copyfile(job.model_dir / "tokenizer.json", writer.path("tokenizer.json"))
    job.features.save(writer.path("features.json"))
    return report


def _recipe(precision: Precision) -> Recipe:
    return Recipe(
        name=precision.name,
        bits=precision.bits,
        block=precision.block,
        accuracy_level=precision.accuracy_level,
        experts=precision.experts,
        adapter_bits=precision.adapter_bits,
        head_bits=precision.head_bits,
        embedding_bits=precision.embedding_bits,
        tower_bits=precision.tower_bits,
        kv_dtype=precision.kv_dtype,
    )


def _compare(
    bundle: Bundle, examples: ExampleSet, references: list[parity.Trace], job: _Job
) -> dict[str, Any]:
    """The manifest's `parity`, measured on ONNX Runtime through the bundle's own files."""
    from crab_edge import engines

    try:
        engine = engines.create("onnxruntime", bundle)
    except DependencyError as error:
        raise DependencyError(f"exporting compares the bundle with the float model: {error}") from None
    return parity.measure(bundle, engine, examples, references, job.tick("comparing with the float model"))
