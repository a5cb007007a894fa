"""Crab+'s own adapter file, `finetune_weights.bin`, to and from an adapter directory.

The file is a zip written by `torch.save`: a flat dictionary from
`base_model.model.{model.layers.N|visual.blocks.N|audio_tower.layers.N}.<linear>.{lora_route|lora_A|lora_B0..}.weight`
to tensors on the CPU (bf16 as released), 388 linears and 1,940 tensors at 7B, 444 and 2,220 at 3B. Source:
Crab+ reference. Both ways are exact to the bit and move tensors from map to file, so memory doesn't grow with
the adapter.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import Qwen2_5OmniThinkerConfig

from crab_edge.errors import InputError, ModelError
from crab_edge.ilora.torch_tuner import ILoRAConfig
from crab_edge.model.adapter import (
    CONFIG,
    TARGETS,
    WEIGHTS,
    adapter_config,
    adapter_shapes,
    check_adapter_files,
    check_decoder,
    decoder_size,
    matching_linears,
    target_linears,
)
from crab_edge.model.base import load_config, on_meta
from crab_edge.model.config import SIZES, describe_decoder, official_config, official_name
from crab_edge.model.official_file import read_tensors
from crab_edge.model.weights import Shape, check_finite, check_weights, save_tensors
from crab_edge.staging import check_space, staged_file, staged_folder
from crab_edge.weight_names import AUDIO, DECODER, PEFT_PREFIX, VISION, canonical, official, transformers_name

RANK, EXPERTS, ALPHA, DROPOUT = 128, 3, 256, 0.1
"""Of the released adapter; the file itself holds neither alpha nor dropout."""
PARTS = (DECODER, VISION, AUDIO)
Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class AdapterReport:
    """What an adapter holds, counted by part of the model.

    zero_linears: those whose experts are all exactly zero; drawn_linears: those that the adapter lacked.
    """

    path: str
    base: str
    rank: int
    experts: int
    alpha: float
    linears: dict[str, int]
    zero_linears: dict[str, int]
    drawn_linears: dict[str, int]
    tensors: int
    parameters: int
    dtypes: dict[str, int]

    @property
    def idle_parts(self) -> list[str]:
        """Parts that have linears, all of them zero: exact no-ops, which exports leave out."""
        return [p for p in PARTS if self.linears.get(p) and self.zero_linears.get(p) == self.linears[p]]

    def as_json(self) -> dict:
        """Plain values."""
        return asdict(self) | {"idle_parts": self.idle_parts}


def import_adapter(
    file: Path | str,
    out: Path | str,
    *,
    base: Path | str | None = None,
    size: str | None = None,
    rank: int = RANK,
    experts: int = EXPERTS,
    alpha: float = ALPHA,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> AdapterReport:
    """Official file -> adapter directory `out` (PEFT's, dtype kept), which appears whole or not at all.

    base: a model directory whose config.json decides the shapes; size: "7b" or "3b" instead; without either
    the file's own decoder says which of the two it is. Raises ModelError for a file that isn't exactly an
    adapter of that base at this rank and number of experts, InputError where it can't be written.
    """
    path = Path(file)
    tensors = _canonical_tensors(path)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    config, name = _base_config(base, size, shapes, path)
    linears = {canonical(n): widths for n, widths in target_linears(on_meta(config)).items()}
    expected = adapter_shapes(linears, rank, experts)
    _check(shapes, expected, linears, rank, experts, path)
    strided = next((name for name in expected if not tensors[name].is_contiguous()), None)
    if strided is not None:
        raise ModelError(f"{path}: {strided} isn't stored in order; save it anew with .contiguous()")
    zero = _zero_linears(tensors, linears, experts, path, progress)
    peft = ILoRAConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=DROPOUT,
        num_experts=experts,
        target_modules=sorted(TARGETS),
        inference_mode=True,
    )
    ordered = {f"{PEFT_PREFIX}{transformers_name(n)}": tensors[n] for n in expected}
    report = _report(out, name, peft, linears, zero, {}, ordered)
    metadata = {"format": "pt", "source": path.name, "idle_parts": json.dumps(report.idle_parts)}
    check_space(out, sum(t.nbytes for t in ordered.values()) + 10_000_000, "the adapter")
    with staged_folder(out, overwrite=overwrite, ours=is_adapter_directory) as folder:
        if progress:
            progress("writing", 0.5)
        save_tensors(ordered, folder / WEIGHTS, metadata)
        try:
            peft.save_pretrained(str(folder))
        except OSError as error:
            raise InputError(f"{out}: can't be written ({error.strerror}); choose another --out") from None
    return report


def export_adapter(
    directory: Path | str,
    out: Path | str,
    *,
    base: Path | str | None = None,
    size: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> AdapterReport:
    """Adapter directory -> official file `out`, with the official code's keys and order; dtypes are kept.

    The official loader wraps both encoders too: encoder linears that the adapter doesn't cover are written
    as a fresh adapter has them (zero experts, exact no-ops) and counted in `drawn_linears`.
    """
    path = Path(directory)
    peft = adapter_config(path)
    shapes = _directory_shapes(path)
    config, name = _base_config(base, size, shapes, path)
    thinker = on_meta(config)
    covered = matching_linears(thinker, peft)
    files = check_adapter_files(path, peft, covered)
    linears = {canonical(n): widths for n, widths in target_linears(thinker).items()}
    absent = [n for n in linears if n not in covered]
    beyond = [n for n in covered if n not in linears]
    if beyond or any(n.startswith(DECODER) for n in absent):
        odd = (beyond or [n for n in absent if n.startswith(DECODER)])[0]
        raise ModelError(
            f"{path}: adapts {'more' if beyond else 'fewer'} linears than Crab+ does, first {odd}: "
            "the official code couldn't load it"
        )
    tensors = {n: files.tensor(n) for n in files}
    zero = _zero_linears(tensors, covered, peft.num_experts, path, progress)
    dtype = next(iter(tensors.values())).dtype
    fresh = _fresh({n: linears[n] for n in absent}, peft, dtype)
    tensors |= fresh
    expected = adapter_shapes(linears, peft.r, peft.num_experts)
    ordered = {f"{PEFT_PREFIX}{official(n)}": tensors[n] for n in expected}
    check_space(out, sum(t.nbytes for t in ordered.values()) + 10_000_000, "the adapter")
    with staged_file(out, overwrite=overwrite) as file:
        if progress:
            progress("writing", 0.5)
        try:
            torch.save(ordered, file)
        except (OSError, RuntimeError) as error:
            raise InputError(
                f"{out}: can't be written ({error}); free some space or choose another --out"
            ) from None
    return _report(out, name, peft, linears, [*zero, *absent], _by_part(absent), ordered)


def is_adapter_directory(folder: Path) -> bool:
    """Whether a folder holds an adapter and nothing else."""
    names = {entry.name for entry in folder.iterdir()}
    return {CONFIG, WEIGHTS} <= names <= {CONFIG, WEIGHTS, "README.md"}


def _canonical_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The file's tensors without the prefixes that the official code may or may not write."""
    out: dict[str, torch.Tensor] = {}
    for name, tensor in read_tensors(path).items():
        key = canonical(name)
        if key in out:
            raise ModelError(f"{path}: holds {key} twice, under names that differ in their prefix only")
        out[key] = tensor
    return out


def _base_config(
    base: Path | str | None, size: str | None, shapes: Mapping[str, Shape], path: Path
) -> tuple[Qwen2_5OmniThinkerConfig, str]:
    """The base's configuration and its name."""
    if base is not None and size is not None:
        raise InputError("--base and --size both say what the base is: give one of them")
    if base is not None:
        config = load_config(base)
        text = config.text_config
        name = official_name(text.num_hidden_layers, text.hidden_size) or Path(base).resolve().name
        return config, name
    if size is not None:
        config = official_config(size)
        return config, SIZES[size]
    found = decoder_size({n: s[-1] for n, s in shapes.items() if n.endswith(".q_proj.lora_A.weight")})
    if found is None:
        raise ModelError(f"{path}: holds no I-LoRA of a decoder ({len(shapes):,} tensors); expected Crab+'s")
    for size, name in SIZES.items():
        if name == official_name(*found):
            return official_config(size), name
    raise ModelError(
        f"{path}: is an adapter for {describe_decoder(*found)}, neither {' nor '.join(SIZES.values())}: "
        "name its base with --base"
    )


def _check(
    shapes: Mapping[str, Shape],
    expected: Mapping[str, Shape],
    linears: dict[str, tuple[int, int]],
    rank: int,
    experts: int,
    path: Path,
) -> None:
    check_decoder(shapes, linears, path)
    ranks = {s[0] for n, s in shapes.items() if n.endswith(".lora_A.weight") and len(s) == 2}
    counts = {s[0] for n, s in shapes.items() if n.endswith(".lora_route.weight") and len(s) == 2}
    if len(ranks) == len(counts) == 1 and (ranks, counts) != ({rank}, {experts}):
        (r,), (n,) = ranks, counts
        raise ModelError(
            f"{path}: has rank {r} and {n} experts, expected rank {rank} and {experts}: if that is right, "
            f"say --rank {r} --experts {n} and its own --alpha"
        )
    check_weights(
        {f"{PEFT_PREFIX}{official(n)}": shape for n, shape in shapes.items()},
        {f"{PEFT_PREFIX}{official(n)}": shape for n, shape in expected.items()},
        path,
        "it isn't a whole finetune_weights.bin of this base",
    )


def _zero_linears(
    tensors: Mapping[str, torch.Tensor],
    linears: Mapping[str, tuple[int, int]],
    experts: int,
    path: Path,
    progress: Progress | None,
) -> list[str]:
    """Reads everything once: refuses NaN and infinity, returns the linears whose experts are all zero."""
    zero = []
    for i, name in enumerate(linears):
        if progress:
            progress("checking", 0.5 * i / len(linears))
        for part in ("lora_route", "lora_A"):
            check_finite(tensors[f"{name}.{part}.weight"], f"{name}.{part}.weight", path)
        names = [f"{name}.lora_B{k}.weight" for k in range(experts)]
        if max(check_finite(tensors[expert], expert, path) for expert in names) == 0:
            zero.append(name)
    return zero


def _fresh(
    linears: Mapping[str, tuple[int, int]], peft: ILoRAConfig, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Tensors of an untrained adapter: A and R drawn as training draws them, every B zero."""
    random = torch.Generator().manual_seed(0)
    out = {}
    for name, shape in adapter_shapes(dict(linears), peft.r, peft.num_experts).items():
        out[name] = torch.zeros(shape, dtype=dtype)
        if ".lora_B" not in name:
            torch.nn.init.kaiming_uniform_(out[name], a=5**0.5, generator=random)
    return out


def _directory_shapes(path: Path) -> dict[str, Shape]:
    from crab_edge.model.weights import WeightFiles

    return WeightFiles(path, Path(WEIGHTS).stem).shapes()


def _by_part(names: list[str]) -> dict[str, int]:
    counts = {part: sum(n.startswith(f"{part}.") for n in names) for part in PARTS}
    return {part: count for part, count in counts.items() if count}


def _report(
    out: Path | str,
    base: str,
    peft: ILoRAConfig,
    linears: Mapping[str, object],
    zero: list[str],
    drawn: dict[str, int],
    tensors: Mapping[str, torch.Tensor],
) -> AdapterReport:
    dtypes: dict[str, int] = {}
    for tensor in tensors.values():
        kind = str(tensor.dtype).removeprefix("torch.")
        dtypes[kind] = dtypes.get(kind, 0) + 1
    return AdapterReport(
        path=str(out),
        base=base,
        rank=peft.r,
        experts=peft.num_experts,
        alpha=peft.lora_alpha,
        linears=_by_part(list(linears)),
        zero_linears=_by_part(zero),
        drawn_linears=drawn,
        tensors=len(tensors),
        parameters=sum(t.numel() for t in tensors.values()),
        dtypes=dtypes,
    )
