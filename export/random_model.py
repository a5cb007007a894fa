"""Random models of the official sizes and form, to prove the way from official files to a running bundle.

    python -m crab_edge_export.random_model --size 7b --out base --adapter finetune_weights.bin

writes a Hugging Face directory of Qwen2.5-Omni (bf16 shards with an index, tokenizer, processor) and Crab+'s
adapter file. The weights are noise, scaled so that activations stay near 1 in every layer; every tensor has
bytes of its own. Memory while writing: one shard, or the adapter's decoder part.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from crab_edge.errors import CrabError, InputError

from .official_form import official_json, processor_json, synthetic_tokenizer

SHARD_BYTES = 1_500_000_000
# Of an adapted linear's output, roughly: how much of it the experts add.
_EXPERT_STD = 0.012
_SPARE_IDS = 64
Tell = Callable[[str], None]


def resized(
    config: Any,
    *,
    layers: int | None = None,
    vision_depth: int | None = None,
    audio_layers: int | None = None,
    vocab: int | None = None,
) -> Any:
    """A copy of a thinker's configuration with fewer layers or ids, at its true widths otherwise."""
    out = copy.deepcopy(config)
    text, vision, audio = out.text_config, out.vision_config, out.audio_config
    if layers is not None:
        text.num_hidden_layers, text.layer_types = layers, ["full_attention"] * layers
    if vision_depth is not None:
        vision.depth = vision_depth
        # The last block attends to the whole frame, as in the official tower.
        full = [i for i in vision.fullatt_block_indexes if i < vision_depth]
        vision.fullatt_block_indexes = full or [vision_depth - 1]
    if audio_layers is not None:
        audio.encoder_layers = audio_layers
    if vocab is not None:
        _renumber(out, vocab)
    for what, count in (
        ("--layers", layers),
        ("--vision-depth", vision_depth),
        ("--audio-layers", audio_layers),
    ):
        if count is not None and count < 1:
            raise InputError(f"{what}: expected 1 or more, got {count}")
    return out


def write_base(
    config: Any, out: Path | str, *, seed: int = 0, overwrite: bool = False, tell: Tell = lambda line: None
) -> Path:
    """A Hugging Face directory of a thinker with random bf16 weights, shard by shard; all or nothing."""
    from crab_edge.model.base import thinker_shapes
    from crab_edge.model.weights import save_tensors
    from crab_edge.staging import check_space, staged_folder
    from crab_edge.weight_names import THINKER_PREFIX, official

    shapes = thinker_shapes(config)
    shards = list(_shards(shapes))
    total = 2 * sum(_numel(shape) for shape in shapes.values())
    check_space(out, total + 50_000_000, "the model")
    with staged_folder(out, overwrite=overwrite, ours=lambda old: (old / "config.json").is_file()) as folder:
        places = {}
        for i, names in enumerate(shards, start=1):
            file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
            tensors = {
                f"{THINKER_PREFIX}{official(name)}": _tensor(name, shapes[name], config, seed)
                for name in names
            }
            save_tensors(tensors, folder / file, {"format": "pt"})
            places.update(dict.fromkeys(tensors, file))
            tell(f"{file}: {sum(t.nbytes for t in tensors.values()) / 1e9:.2f} GB, {len(tensors)} tensors")
            del tensors
        _write(
            folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": places}
        )
        _write(folder / "config.json", official_json(config))
        _write(folder / "preprocessor_config.json", processor_json(config))
        synthetic_tokenizer(config).save(str(folder / "tokenizer.json"))
    return Path(out)


def write_adapter(
    config: Any,
    out: Path | str,
    *,
    rank: int = 128,
    experts: int = 3,
    towers: bool = False,
    seed: int = 0,
    overwrite: bool = False,
) -> Path:
    """Crab+'s `finetune_weights.bin` for this thinker, bf16.

    Without `towers` the encoders' experts are all zero, as one expects of the released file.
    """
    import torch

    from crab_edge.model.adapter import adapter_shapes, target_linears
    from crab_edge.model.base import on_meta
    from crab_edge.staging import check_space, staged_file
    from crab_edge.weight_names import DECODER, PEFT_PREFIX, canonical, official

    linears = {canonical(name): widths for name, widths in target_linears(on_meta(config)).items()}
    shapes = adapter_shapes(linears, rank, experts)
    check_space(out, 2 * sum(_numel(shape) for shape in shapes.values()) + 50_000_000, "the adapter")
    tensors = {}
    for name, shape in shapes.items():
        if ".lora_B" not in name:
            # Routers that decide: logits of about 1.
            std = (1.0 if "lora_route" in name else 0.58) * shape[1] ** -0.5
        else:
            std = _EXPERT_STD if towers or name.startswith(DECODER) else 0.0
        tensor = torch.zeros(shape, dtype=torch.bfloat16)
        tensors[f"{PEFT_PREFIX}{official(name)}"] = (
            tensor.normal_(0, std, generator=_random(name, seed)) if std else tensor
        )
    with staged_file(out, overwrite=overwrite) as file:
        try:
            torch.save(tensors, file)
        except (OSError, RuntimeError) as error:
            raise InputError(f"{out}: can't be written ({error}); choose another place") from None
    return Path(out)


def _renumber(config: Any, vocab: int) -> None:
    """Fewer ids: the special ones keep their order and move to the end."""
    from crab_edge.model.config import TOKENS

    names = [*TOKENS, "pad_token_id"]
    span = max(getattr(config, n) for n in names) - min(getattr(config, n) for n in names)
    if vocab < 512 or span >= _SPARE_IDS:
        raise InputError(f"--vocab: expected 512 or more, got {vocab}")
    shift = vocab - _SPARE_IDS - min(getattr(config, name) for name in names)
    for name in names:
        setattr(config, name, getattr(config, name) + shift)
    config.user_token_id = 0
    config.eos_token_id = config.text_config.eos_token_id = config.im_end_token_id
    config.text_config.pad_token_id = config.pad_token_id
    config.text_config.vocab_size = vocab


def _shards(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[list[str]]:
    """Names shard by shard, in the model's order."""
    names: list[str] = []
    size = 0
    for name, shape in shapes.items():
        more = 2 * _numel(shape)
        if names and size + more > SHARD_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += more
    yield names


def _tensor(name: str, shape: tuple[int, ...], config: Any, seed: int) -> Any:
    """Noise that keeps activations near 1: 1/sqrt(fan in), less where a layer adds to its residual."""
    import torch

    if len(shape) == 1:
        mean, std = (1.0, 0.05) if name.endswith("weight") else (0.0, 0.02)
    elif "embed_tokens" in name:
        mean, std = 0.0, 1.0
    else:
        mean, std = 0.0, (_numel(shape) / shape[0]) ** -0.5
        if name.endswith(
            ("o_proj.weight", "down_proj.weight", "out_proj.weight", "fc2.weight", "attn.proj.weight")
        ):
            std *= (2 * _depth(name, config)) ** -0.5
    return torch.empty(shape, dtype=torch.bfloat16).normal_(mean, std, generator=_random(name, seed))


def _depth(name: str, config: Any) -> int:
    from crab_edge.weight_names import AUDIO, VISION

    if name.startswith(VISION):
        return config.vision_config.depth
    return (
        config.audio_config.encoder_layers if name.startswith(AUDIO) else config.text_config.num_hidden_layers
    )


def _random(name: str, seed: int) -> Any:
    """A generator of the tensor's own, so that a cut model's layers are the whole model's."""
    import torch

    # The generator listens to 32 bits only.
    return torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))


def _numel(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """The command line; the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m crab_edge_export.random_model",
        description="Write a random model in the official form.",
    )
    parser.add_argument("--size", choices=("7b", "3b"), required=True)
    parser.add_argument("--out", type=Path, required=True, help="the Hugging Face directory to write")
    parser.add_argument("--adapter", type=Path, help="write Crab+'s adapter to this file, too")
    parser.add_argument("--tower-experts", action="store_true", help="draw the encoders' experts as well")
    parser.add_argument("--layers", type=int, help="decoder layers (default: all)")
    parser.add_argument("--vision-depth", type=int, help="vision blocks (default: all)")
    parser.add_argument("--audio-layers", type=int, help="audio layers (default: all)")
    parser.add_argument("--vocab", type=int, help="ids of the vocabulary (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--overwrite", action="store_true")
    given = parser.parse_args(arguments)
    try:
        return _run(given)
    except CrabError as error:
        print(f"random_model: error: {error}", file=sys.stderr)
        return error.exit_code


def _run(given: argparse.Namespace) -> int:
    import resource

    from crab_edge.model.config import official_config

    config = resized(
        official_config(given.size),
        layers=given.layers,
        vision_depth=given.vision_depth,
        audio_layers=given.audio_layers,
        vocab=given.vocab,
    )
    start = time.monotonic()

    def tell(line: str) -> None:
        print(f"{time.monotonic() - start:7.1f} s  {line}", flush=True)

    write_base(config, given.out, seed=given.seed, overwrite=given.overwrite, tell=tell)
    tell(f"{given.out}: done")
    if given.adapter is not None:
        options = {"towers": given.tower_experts, "seed": given.seed, "overwrite": given.overwrite}
        write_adapter(config, given.adapter, **options)
        tell(f"{given.adapter}: {given.adapter.stat().st_size / 1e9:.2f} GB")
    tell(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
