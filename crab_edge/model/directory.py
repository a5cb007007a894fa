"""A model directory with all that an export needs, in our own form or as Hugging Face has Qwen2.5-Omni.

Ours has features.json and card.json. Hugging Face's has preprocessor_config.json (or processor_config.json)
instead: sizes come from there, and are refused where they aren't what this project's features can make.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import Qwen2_5OmniThinkerConfig

from crab_edge.errors import ModelError
from crab_edge.features import FeatureConfig
from crab_edge.model.base import Card, load_card, load_config, read_json
from crab_edge.model.config import PAD_TOKEN, TOKENS, official_name
from crab_edge.model.weights import WeightFiles

PROCESSORS = ("preprocessor_config.json", "processor_config.json")
_RESCALE = 1 / 255


@dataclass(frozen=True)
class ModelDir:
    """A directory whose parts fit each other; its weights are not read yet."""

    path: Path
    config: Qwen2_5OmniThinkerConfig
    features: FeatureConfig
    card: Card

    @property
    def tokenizer_file(self) -> Path:
        """tokenizer.json."""
        return self.path / "tokenizer.json"

    def weights(self) -> WeightFiles:
        """The base's weight files, their headers read."""
        return WeightFiles(self.path)


def open_model_dir(directory: Path | str) -> ModelDir:
    """Read and check everything but the weights. ModelError for what is missing or doesn't fit.

    A Hugging Face directory gets a card with the model's name and nothing else.
    """
    path = Path(directory)
    config = load_config(path)
    if (path / "features.json").is_file():
        features, card = FeatureConfig.load(path / "features.json"), load_card(path)
    else:
        features = _official_features(path, config)
        text = config.text_config
        name = official_name(text.num_hidden_layers, text.hidden_size) or path.resolve().name
        card = Card(name=name)
    _check_sizes(path, config, features)
    _check_tokenizer(path / "tokenizer.json", config)
    return ModelDir(path, config, features, card)


def _official_features(path: Path, config: Qwen2_5OmniThinkerConfig) -> FeatureConfig:
    """From Hugging Face's processor files; what they leave out is what transformers' classes assume."""
    file = next((path / name for name in PROCESSORS if (path / name).is_file()), None)
    if file is None:
        raise ModelError(
            f"{path}: neither features.json nor {PROCESSORS[0]}; expected a model directory of "
            "crab-edge or of Qwen2.5-Omni"
        )
    raw = read_json(file)
    sound = raw.get("feature_extractor", raw)
    image = raw.get("image_processor", raw)
    if not isinstance(sound, dict) or not isinstance(image, dict):
        raise ModelError(f"{file}: feature_extractor and image_processor must be objects; copy it again")
    _expect(file, sound, "feature_extractor_type", "WhisperFeatureExtractor", None)
    _expect(file, sound, "dither", 0.0, 0.0)
    kind = str(image.get("image_processor_type", ""))
    if not kind.startswith("Qwen2VLImageProcessor"):
        raise ModelError(f"{file}: image_processor_type is {kind!r}, expected 'Qwen2VLImageProcessor'")
    for flag in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"):
        _expect(file, image, flag, True, True)
    if abs(image.get("rescale_factor", _RESCALE) - _RESCALE) > 1e-6:
        raise ModelError(f"{file}: rescale_factor is {image['rescale_factor']}, expected 1/255")
    defaults = FeatureConfig()
    values: dict[str, Any] = {
        # 80 is what WhisperFeatureExtractor assumes where a file doesn't say.
        "n_mels": sound.get("feature_size", 80),
        "n_fft": sound.get("n_fft", 400),
        "hop": sound.get("hop_length", 160),
        "sample_rate": sound.get("sampling_rate", 16000),
        "patch": image.get("patch_size", 14),
        "temporal_patch": image.get("temporal_patch_size", 2),
        "merge": image.get("merge_size", 2),
        "mean": image.get("image_mean", defaults.mean),
        "std": image.get("image_std", defaults.std),
        "audio_chunk": 2 * config.audio_config.n_window,
        "position_id_per_second": config.position_id_per_seconds,
        # One frame a second, as the official processor counts where nobody says otherwise.
        "seconds_per_grid": float(image.get("temporal_patch_size", 2)),
    }
    try:
        features = FeatureConfig(**values)
    except ValueError as error:
        raise ModelError(f"{file}: not the features of Qwen2.5-Omni ({error})") from None
    pixels = features.image_size**2
    size = image.get("size") or {}
    least = image.get("min_pixels") or size.get("shortest_edge") or 56 * 56
    most = image.get("max_pixels") or size.get("longest_edge") or 28 * 28 * 1280
    if not least <= pixels <= most:
        raise ModelError(
            f"{file}: takes images of {least} to {most} pixels, expected a range around "
            f"{features.image_size} x {features.image_size}"
        )
    return features


def _expect(file: Path, raw: dict[str, Any], key: str, wanted: Any, default: Any) -> None:
    found = raw.get(key, default)
    if found != wanted:
        raise ModelError(
            f"{file}: {key} is {found!r}, expected {wanted!r}: not the processor of Qwen2.5-Omni"
        )


def _check_sizes(path: Path, config: Qwen2_5OmniThinkerConfig, features: FeatureConfig) -> None:
    sound, vision, text = config.audio_config, config.vision_config, config.text_config
    pairs = {
        "mel bands": (features.n_mels, sound.num_mel_bins),
        "mel frames a chunk": (features.audio_chunk, 2 * sound.n_window),
        "pixels a patch": (features.patch, vision.patch_size),
        "frames a temporal patch": (features.temporal_patch, vision.temporal_patch_size),
        "patches a merge": (features.merge, vision.spatial_merge_size),
        "position ids a second": (features.position_id_per_second, config.position_id_per_seconds),
    }
    for what, (made, taken) in pairs.items():
        if made != taken:
            raise ModelError(
                f"{path}: the features have {made} {what}, but config.json's encoders take {taken}; "
                "they belong to different models"
            )
    for what, width in (("vision", vision.out_hidden_size), ("audio", sound.output_dim)):
        if width != text.hidden_size:
            raise ModelError(
                f"{path}: config.json's {what} encoder gives width {width}, but its decoder takes "
                f"{text.hidden_size}"
            )


def _check_tokenizer(file: Path, config: Qwen2_5OmniThinkerConfig) -> None:
    """The tokenizer's special tokens must have the ids that the model was trained with.

    Ids that `config` doesn't have (those of the chat's turns aren't in the released one) are filled in.
    """
    from tokenizers import Tokenizer

    if not file.is_file():
        raise ModelError(
            f"no tokenizer.json in {file.parent}; write it with transformers: "
            "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
        )
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # all that the library raises
        raise ModelError(f"{file}: not a readable tokenizer.json ({error}); copy it again") from None
    for attribute, token in {**TOKENS, "pad_token_id": PAD_TOKEN}.items():
        known, found = getattr(config, attribute, None), tokenizer.token_to_id(token)
        if found is None:
            raise ModelError(f"{file}: lacks the token {token}; expected a tokenizer of Qwen2.5-Omni")
        if known is None:
            setattr(config, attribute, found)
        elif known != found:
            raise ModelError(
                f"{file}: {token} has id {found}, but config.json's {attribute} is {known}; "
                "they belong to different models"
            )
    rows, ids = config.text_config.vocab_size, max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    if ids > rows:
        raise ModelError(
            f"{file}: has {ids} ids, but the model has rows for {rows}; they don't belong together"
        )
