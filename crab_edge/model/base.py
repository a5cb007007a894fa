"""The base model: building it with fresh weights, and its directory on disk.

    config.json  model*.safetensors  tokenizer.json  features.json  card.json

Loading is strict: a missing, unknown or misshapen weight is a ModelError that names it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import Qwen2_5OmniThinkerConfig, Qwen2_5OmniThinkerForConditionalGeneration
from transformers.initialization import no_init_weights

from crab_edge.errors import ModelError

Thinker = Qwen2_5OmniThinkerForConditionalGeneration


class Card(BaseModel):
    """What people and the runtime should know of a model beyond its sizes."""

    model_config = ConfigDict(extra="forbid")
    name: str
    labels: list[str] | None = None
    question_templates: list[str] | None = None
    tasks: list[str] | None = None
    notes: dict[str, Any] = {}


def build(config: Qwen2_5OmniThinkerConfig, seed: int = 0) -> Thinker:
    """A thinker with fresh fp32 weights, the same for the same seed, in eval mode.

    The global random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Thinker(config).float().eval()


def save_base(
    model: Thinker,
    directory: Path | str,
    tokenizer_file: Path | str,
    features: Any,
    card: Card | dict | None = None,
) -> Path:
    """Write a model directory. `features` is a FeatureConfig, a dictionary or a features.json.

    The weights keep their dtype. A model that carries an adapter is refused: save the adapter with
    `save_adapter`, and the base that was wrapped with `PeftModel.unload()`.
    """
    wrapped = [name for name in model.state_dict() if ".base_layer." in name]
    if wrapped:
        raise ModelError(
            f"save_base got a model with an adapter (first adapted weight {wrapped[0]}): unload() it first"
        )
    out = Path(directory)
    out.mkdir(parents=True, exist_ok=True)
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    weights = {n: t.detach().contiguous().cpu() for n, t in model.state_dict().items() if n not in tied}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    model.config.architectures = [Thinker.__name__]
    (out / "config.json").write_text(model.config.to_json_string(use_diff=True), encoding="utf-8")
    if Path(tokenizer_file).resolve() != (out / "tokenizer.json").resolve():
        shutil.copyfile(tokenizer_file, out / "tokenizer.json")
    _write_json(out / "features.json", _plain(features))
    card = Card.model_validate(card or {"name": "unnamed"})
    _write_json(out / "card.json", card.model_dump())
    return out


def load_base(directory: Path | str, dtype: torch.dtype = torch.float32) -> Thinker:
    """Read a model directory written by `save_base`: parameters in `dtype`, eval mode."""
    path = Path(directory)
    config = load_config(path)
    with no_init_weights():
        model = Thinker._from_config(config, dtype=dtype)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    expected = {n: tuple(t.shape) for n, t in model.state_dict().items() if n not in tied}
    check_weights(weight_shapes(path), expected, path)
    with torch.no_grad():
        state = model.state_dict()
        for file in _weight_files(path):
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():
                    state[name].copy_(tensors.get_tensor(name))
    if tied:
        model.tie_weights()
    return model.eval()


def load_config(directory: Path | str) -> Qwen2_5OmniThinkerConfig:
    """The thinker's configuration of a model directory."""
    raw = _read_json(Path(directory) / "config.json")
    if raw.get("model_type") != Qwen2_5OmniThinkerConfig.model_type:
        raise ModelError(
            f"{directory}/config.json is of model_type {raw.get('model_type')!r}, expected "
            f"{Qwen2_5OmniThinkerConfig.model_type!r}: give the thinker's own directory"
        )
    return Qwen2_5OmniThinkerConfig.from_dict(raw)


def load_card(directory: Path | str) -> Card:
    """The card of a model directory."""
    path = Path(directory) / "card.json"
    try:
        return Card.model_validate(_read_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        raise ModelError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def weight_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of every tensor in a directory's safetensors files, from their headers only."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in _weight_files(directory):
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():
                    shapes[name] = tuple(tensors.get_slice(name).get_shape())
        except SafetensorError as error:
            raise ModelError(f"{file} is not a whole safetensors file ({error}): copy it again") from None
    return shapes


def check_weights(
    found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]], where: Path
) -> None:
    """Raise ModelError naming the first missing, unknown or misshapen weight, and how many there are."""
    missing = sorted(expected.keys() - found.keys())
    unknown = sorted(found.keys() - expected.keys())
    misshapen = sorted(n for n in expected.keys() & found.keys() if expected[n] != found[n])
    if missing:
        raise ModelError(
            f"{where} lacks {len(missing)} of {len(expected)} weights, first {missing[0]} "
            f"{expected[missing[0]]}: its config doesn't describe these weights, or the copy is incomplete"
        )
    if misshapen:
        name = misshapen[0]
        raise ModelError(
            f"{where}: {name} has shape {found[name]}, expected {expected[name]} "
            f"({len(misshapen)} such weights): its config doesn't describe these weights"
        )
    if unknown:
        raise ModelError(
            f"{where} holds {len(unknown)} weights that the model doesn't have, first {unknown[0]} "
            f"{found[unknown[0]]}: its config doesn't describe these weights"
        )


def _weight_files(directory: Path) -> list[Path]:
    files = sorted(directory.glob("model*.safetensors"))
    if not files:
        raise ModelError(f"no model*.safetensors in {directory}: expected a directory written by save_base")
    return files


def _read_json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"no {path.name} in {path.parent}: expected a model directory") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} is not JSON ({error})") from None
    if not isinstance(raw, dict):
        raise ModelError(f"{path} holds a {type(raw).__name__}, expected an object")
    return raw


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _plain(features: Any) -> dict[str, Any]:
    if isinstance(features, BaseModel):
        return features.model_dump(mode="json")
    if isinstance(features, dict):
        return features
    return _read_json(Path(features))
