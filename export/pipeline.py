"""A model directory and an adapter -> a bundle: quantise, write graphs, compare with the float model.

Nothing here holds more of the model than one linear, one layer in torch or one block of the embedding. Every
step leaves its result in a work folder beside the output, so that a killed export goes on where it was.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
from crab_edge_calibration import QuantisationReport

from crab_edge import __version__
from crab_edge.bundle import Bundle, BundleWriter
from crab_edge.errors import CrabError, DependencyError, InputError
from crab_edge.manifest import AdapterInfo, Manifest, ModelInfo, Recipe
from crab_edge.plan import WIDE
from crab_edge.prompt import PromptBuilder
from crab_edge.shape import AdapterShape, ModelShape, from_config, shape_info
from crab_edge.sizes import eight_bit_block

from . import parity, preflight, reference
from .decoder import ROOT, decoder_widths, head_dim
from .examples import ExampleSet, Media, clips_of, gather
from .precision import KVType, Precision, choose
from .prompts import collect
from .segments import Segments
from .weights import WeightStore
from .workspace import Workspace, identity_of
from .writing import Files

Progress = Callable[[str, float], None]
METHODS = ("auto", "rtn")
COMPARE = ("auto", "answers", "layers")
# Float models up to this many bytes in float32 are run whole, so that they can write answers.
_WHOLE_BYTES = 1_500_000_000


def export_bundle(
    model_dir: Path | str,
    adapter_dir: Path | str | None,
    out: Path | str,
    *,
    bits: int = 4,
    block: int = 32,
    accuracy_level: int = 4,
    experts: str = "auto",
    kv_dtype: KVType | Literal["auto"] = "auto",
    method: str = "auto",
    compare: str = "auto",
    calibration_media: Media | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Quantise and export a float model to the bundle `out`, which is published whole or not at all.

    bits: 4, 8 or 32 (float graphs); block: weights per scale; accuracy_level: 4 computes products on int8
    activations, 0 on float32; experts: how an adapter's experts are stored (see `Precision`).
    kv_dtype: type of the KV cache; "auto" is float16 in models wider than 2048, else float32.
    method: "auto" rounds 4-bit weights with error feedback where the inputs are real, "rtn" to nearest.
    calibration_media: clips on which inputs are watched and the bundle is compared with the float model; of
    several clips the last quarter serves for comparing only. Without them the packaged clip or synthetic
    scenes are used, the latter for comparing only. The comparison goes into the manifest as `parity`.
    compare: "answers" runs the float model whole and compares along its own greedy answers; "layers" holds
    one layer of it in memory and compares on the prompts; "auto" is "answers" for small models.
    progress: called with what is being done and the share that is done, 0..1.

    An interrupted export goes on when it is called again with the same inputs and options.
    Raises ModelError for directories that don't fit, InputError for options that don't, if `out` exists, or
    if disk or memory won't do.
    """
    for name, value, allowed in (("method", method, METHODS), ("compare", compare, COMPARE)):
        if value not in allowed:
            raise InputError(f"--{name}: expected one of {', '.join(allowed)}, got {value!r}")
    place = BundleWriter(out, overwrite=overwrite)
    place.check_place()
    job = _Job(Path(model_dir), None if adapter_dir is None else Path(adapter_dir), progress)
    with WeightStore(job.model_dir, job.adapter_dir) as weights, _disk(place.out):
        precision = job.precision(weights, bits, block, accuracy_level, experts, kv_dtype)
        examples = gather(calibration_media, job.features)
        small = 4 * weights.n_parameters() <= _WHOLE_BYTES
        whole = compare == "answers" or (compare == "auto" and small)
        watch = reference.watches(method, examples.inputs, bits)
        identity = job.identity(weights, precision, method, whole, calibration_media)
        with Workspace(place.out, identity) as work:
            need = preflight.needs(job.shape(weights), precision, whole, watch, examples)
            preflight.check(need, work)
            if work.restarted:
                job.say("starting over: the inputs or options of the interrupted export were others")
            elif work.resumed:
                job.say(f"going on with an interrupted export: {work.resumed} steps are done")
            run = _Run(job, weights, precision, examples, work, watch)
            with BundleWriter(out, overwrite=overwrite, folder=work.bundle) as writer:
                manifest = run.whole(writer) if whole else run.layers(writer)
                path = writer.commit(manifest)
            work.finish()
            return path


@contextmanager
def _disk(out: Path) -> Iterator[None]:
    """A full disk is said in one line; the work folder stays, `out` is as it was."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free = shutil.disk_usage(out.parent).free
        raise CrabError(
            f"{out.parent}: the disk is full ({free / 1e9:.1f} GB left) and the bundle isn't finished; make "
            f"room and run the same command again to go on, or remove {out.parent / f'.{out.name}.export'}"
        ) from None


class _Run:
    """The steps of one export, over its work folder."""

    def __init__(
        self,
        job: _Job,
        weights: WeightStore,
        precision: Precision,
        examples: ExampleSet,
        work: Workspace,
        watch: bool,
    ) -> None:
        self.job, self.weights, self.precision, self.work, self.watch = job, weights, precision, work, watch
        self.sets = examples.split()
        self.report = QuantisationReport()
        self.files = Files(job.config, weights, precision, self.report, work)

    def whole(self, writer: BundleWriter) -> Manifest:
        """The float model in memory: its answers, then the files, then the bundle along those answers."""
        job, (calibration, comparison, held_out) = self.job, self.sets
        job.plan(
            self.files.steps + (len(calibration.examples) if held_out else 0) + 2 * len(comparison.examples)
        )
        references, moments = reference.answers(
            self.work,
            self._float_engine,
            lambda engine: parity.float_side(engine, job.prompt, job.features, job.model_info(self.weights)),
            self.sets,
            self.watch,
            self.precision.bits,
            job.tick("running the float model"),
        )
        self.files.write(moments, job.tick)
        self.files.finish(job.model_dir, job.features)
        bundle = self._preview(writer)
        engine = self._engine(bundle)
        tick = job.tick("comparing with the float model")
        return self._manifest(parity.measure(bundle, engine, comparison, references, tick))

    def layers(self, writer: BundleWriter) -> Manifest:
        """One layer of the float model in memory: it runs, then the same layer is written."""
        job, (calibration, comparison, held_out) = self.job, self.sets
        from .layered import LayeredEngine

        count = job.config.text_config.num_hidden_layers
        prompts = len(comparison.examples)
        job.plan(self.files.steps + 2 * count + 2 * prompts + (len(calibration.examples) if held_out else 0))
        floats = LayeredEngine(job.config, self.weights)
        side = parity.float_side(floats, job.prompt, job.features, job.model_info(self.weights))
        bits = self.precision.bits
        walk = reference.Walk(self.work, floats, side, self.sets, self.watch, bits, job.tick)
        walk.start(self.files.finished("decoder", "layer"))

        def before(graph: str, step: str) -> None:
            if graph == "decoder" and step.startswith("layer "):
                walk.reach(int(step.split()[1]))
            elif graph == "decoder" and step == "head":
                walk.reach(count - 1)
                walk.logits()

        def after(graph: str, step: str) -> None:
            if graph == "decoder" and step.startswith("layer "):
                walk.forget(int(step.split()[1]))

        self.files.write(walk.moments, job.tick, before, after)
        self.files.finish(job.model_dir, job.features)
        return self._manifest(self._compare_layers(self._preview(writer), comparison, walk))

    def _compare_layers(self, bundle: Bundle, examples: ExampleSet, walk: reference.Walk) -> dict[str, Any]:
        job = self.job
        engine = self._engine(bundle)
        ours = collect(bundle, engine, examples, job.tick("running the encoders"))
        described = engine.describe() | {"decoder": "layer by layer"}
        engine.close()
        errors: list[float] = []

        def seen(i: int, rows: list[Any]) -> None:
            pairs = zip(rows, walk.rows(i), strict=True)
            errors.append(float(np.mean([parity.relative_error(a[-len(b) :], b) for a, b in pairs])))

        graph, decoder, pieces = self.files.decoder()
        segments = Segments(graph, decoder, pieces, self.work.bundle)
        logits = segments.run(ours, seen, job.tick("comparing layer by layer"))
        names = [example.name for example in examples.examples]
        both = (logits, walk.logits())
        found = parity.along_prompts(names, examples.inputs, (ours, walk.prompts()), both, errors)
        return found | {"engine": described}

    def _float_engine(self) -> Any:
        """The float model in torch; loading it also checks every weight's name and shape."""
        from crab_edge.engines.torch import TorchEngine

        return TorchEngine.load(self.job.model_dir, self.job.adapter_dir)

    def _preview(self, writer: BundleWriter) -> Bundle:
        return writer.preview(
            Manifest(model=self.job.model_info(self.weights), recipe=_recipe(self.precision))
        )

    def _engine(self, bundle: Bundle) -> Any:
        from crab_edge import engines

        try:
            return engines.create("onnxruntime", bundle)
        except DependencyError as error:
            raise DependencyError(f"exporting compares the bundle with the float model: {error}") from None

    def _manifest(self, measured: dict[str, Any]) -> Manifest:
        calibration, _, held_out = self.sets
        measured |= {
            "held_out": held_out,
            "calibrated_on": len(calibration.examples) if self.watch else 0,
            "weights": self.report.summary(),
        }
        info = self.job.model_info(self.weights)
        return Manifest(model=info, recipe=_recipe(self.precision), parity=measured)


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
        self._steps = 1

    def say(self, what: str) -> None:
        """Tell what is going on beside the steps."""
        if self._progress is not None:
            self._progress(what, 0.0)

    def plan(self, steps: int) -> None:
        """How many steps there are."""
        self._steps = steps

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
        self, weights: WeightStore, bits: int, block: int, accuracy_level: int, experts: str, kv_dtype: str
    ) -> Precision:
        adapter = weights.adapter_config
        ranks = int(adapter["r"]) * int(adapter["num_experts"]) if adapter else 0
        widths = decoder_widths(self.config.text_config, ranks) if adapter else []
        config = self.config
        if kv_dtype not in ("auto", "float32", "float16"):
            raise InputError(f"--kv: expected auto, float32 or float16, got {kv_dtype!r}")
        wider = config.text_config.hidden_size > WIDE
        cache: Any = ("float16" if wider else "float32") if kv_dtype == "auto" else kv_dtype
        towers = (config.vision_config.hidden_size, config.audio_config.d_model)
        wide = eight_bit_block(bits, block, [config.text_config.hidden_size, *towers])
        return choose(
            bits,
            widths,
            block=block,
            accuracy_level=accuracy_level,
            experts=experts,
            kv_dtype=cache,
            block8=None if wide == block else wide,
        )

    def shape(self, weights: WeightStore) -> ModelShape:
        """What `crab_edge.sizes` needs to count bytes. Encoders whose experts are all zero have none."""
        adapter, known = weights.adapter_config, None
        if adapter:
            used = set(weights.adapted()) - set(weights.zero_linears)
            towers = any(not path.startswith(f"{ROOT}.") for path in used)
            known = AdapterShape(int(adapter["r"]), int(adapter["num_experts"]), towers)
        return from_config(self.config.to_dict(), self.card.name, known)

    def identity(
        self,
        weights: WeightStore,
        precision: Precision,
        method: str,
        whole: bool,
        media: Media | None,
    ) -> dict[str, Any]:
        """What the work depends on: inputs, options, version."""
        processors = ("preprocessor_config.json", "processor_config.json")
        names = ("config.json", "tokenizer.json", "features.json", "card.json", *processors)
        files = [*weights.files(), *(self.model_dir / name for name in names)]
        if self.adapter_dir is not None:
            files.append(self.adapter_dir / "adapter_config.json")
        return {
            "crab_edge": __version__,
            "precision": asdict(precision),
            "method": method,
            "whole": whole,
            "model": identity_of([file for file in files if file.is_file()]),
            "media": [identity_of(group) for group in clips_of(media or [])],
        }

    def model_info(self, weights: WeightStore) -> ModelInfo:
        """Identity and sizes."""
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
            shape=shape_info(self.shape(weights)),
        )


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
        block8=precision.block8,
    )
