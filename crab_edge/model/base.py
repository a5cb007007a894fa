"""The base model: building it with fresh weights, and its directory on disk.

    config.json  model*.safetensors  tokenizer.json  features.json  card.json

or a Hugging Face directory of Qwen2.5-Omni, whose talker and token2wav are left aside (`directory.py` reads
what it has instead of the last two files). Loading is strict: a missing, unknown or misshapen weight is a
ModelError that names it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.torch import save_file
from transformers import Qwen2_5OmniThinkerConfig, Qwen2_5OmniThinkerForConditionalGeneration
from transformers.initialization import no_init_weights

from crab_edge.errors import ModelError
from crab_edge.model.weights import Shape, WeightFiles, check_finite, check_weights
from crab_edge.weight_names import canonical, transformers_name

OMNI = "qwen2_5_omni"
"""model_type of the whole Qwen2.5-Omni, thinker and talker."""
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
    """Read a model directory (ours or Hugging Face's): parameters in `dtype`, eval mode.

    Files are mapped one tensor at a time, so memory holds the model and hardly more while it is read.
    """
    path = Path(directory)
    config = load_config(path)
    files = check_base(path, config)
    with no_init_weights():
        model = Thinker._from_config(config, dtype=dtype)
    state = model.state_dict()
    with torch.no_grad():
        for name in files:
            tensor = files.tensor(name)
            check_finite(tensor, name, path)
            state[transformers_name(name)].copy_(tensor)
    if config.tie_word_embeddings:
        model.tie_weights()
    return model.eval()


def check_base(directory: Path | str, config: Qwen2_5OmniThinkerConfig) -> WeightFiles:
    """The weight files of a model directory; ModelError unless they hold exactly what `config` says.

    A head that is stored is used as it is stored, whatever the configuration said of tying: `config` then
    says so too.
    """
    files = WeightFiles(directory)
    if "lm_head.weight" in files:
        config.tie_word_embeddings = False
    check_weights(
        {transformers_name(n): shape for n, shape in files.shapes().items()},
        {transformers_name(n): shape for n, shape in thinker_shapes(config).items()},
        directory,
    )
    return files


def thinker_shapes(config: Qwen2_5OmniThinkerConfig) -> dict[str, Shape]:
    """Canonical name -> shape of every weight that a model directory of this configuration holds."""
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    shapes = {canonical(n): tuple(t.shape) for n, t in on_meta(config).state_dict().items()}
    return {n: shape for n, shape in shapes.items() if n not in tied}


def on_meta(config: Qwen2_5OmniThinkerConfig) -> Thinker:
    """The thinker without memory for its weights: names and shapes, whatever its size."""
    with torch.device("meta"), no_init_weights():
        return Thinker(config)


def load_config(directory: Path | str) -> Qwen2_5OmniThinkerConfig:
    """The thinker's configuration of a model directory, ours or Hugging Face's."""
    path = Path(directory) / "config.json"
    raw = read_json(path)
    kind = raw.get("model_type")
    if kind == OMNI:
        raw = raw.get("thinker_config")
        if not isinstance(raw, dict):
            raise ModelError(f"{path}: a {OMNI} without thinker_config; copy it from the model again")
    elif kind != Qwen2_5OmniThinkerConfig.model_type:
        raise ModelError(
            f"{path} is of model_type {kind!r}, expected {OMNI!r} or "
            f"{Qwen2_5OmniThinkerConfig.model_type!r}: give the directory of a Qwen2.5-Omni"
        )
    text = raw.get("text_config") or {}
    # The text part's class says "tied" where its file says nothing; only what the file says counts.
    tied = raw.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
    try:
        return Qwen2_5OmniThinkerConfig.from_dict({**raw, "tie_word_embeddings": bool(tied)})
    except (TypeError, ValueError, KeyError, AttributeError, StrictDataclassError) as error:
        raise ModelError(f"{path}: not a thinker's configuration ({error})") from None


def load_card(directory: Path | str) -> Card:
    """The card of a model directory."""
    path = Path(directory) / "card.json"
    try:
        return Card.model_validate(read_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        raise ModelError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a model directory; ModelError if there is none."""
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
    return read_json(Path(features))
