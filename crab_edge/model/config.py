"""Configurations: the sizes known by name, and the special ids that a tokenizer gives to one."""

from __future__ import annotations

import copy
import json
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import Qwen2_5OmniThinkerConfig

from crab_edge.errors import InputError, ModelError

if TYPE_CHECKING:
    from crab_edge.prompt import SpecialIds

# Attribute of the thinker's configuration for every special token of the chat text (names of Qwen2.5-Omni).
# The last four aren't fields of the official class; it keeps what it is given.
TOKENS = {
    "audio_token_index": "<|AUDIO|>",
    "image_token_index": "<|IMAGE|>",
    "video_token_index": "<|VIDEO|>",
    "audio_start_token_id": "<|audio_bos|>",
    "audio_end_token_id": "<|audio_eos|>",
    "vision_start_token_id": "<|vision_bos|>",
    "vision_end_token_id": "<|vision_eos|>",
    "im_start_token_id": "<|im_start|>",
    "im_end_token_id": "<|im_end|>",
}
PAD_TOKEN = "<|endoftext|>"
SIZES = {"7b": "Qwen2.5-Omni-7B", "3b": "Qwen2.5-Omni-3B"}


def nano_config(**text_changes: Any) -> Qwen2_5OmniThinkerConfig:
    """Crab-nano's thinker: decoder 256 x 6, vision 192 x 5, the audio tower of Whisper tiny.en.

    `text_changes` replace entries of its text part (smaller models for tests). The special ids are those of
    the official vocabulary until `with_tokenizer` sets them.
    """
    sizes = _resource("nano.json")
    sizes["text_config"].update(text_changes)
    return Qwen2_5OmniThinkerConfig(**sizes)


def official_config(size: str) -> Qwen2_5OmniThinkerConfig:
    """The thinker of Qwen2.5-Omni "7b" or "3b", so that files can be checked without the base at hand.

    Sizes and ids are those of the released configurations. Whether the 3B's head is tied isn't known here:
    with a base directory at hand, its own config.json and files decide.
    """
    if size not in SIZES:
        raise InputError(f"--size: expected {' or '.join(SIZES)}, got {size!r}")
    return Qwen2_5OmniThinkerConfig(**_resource(f"{SIZES[size].lower()}.json"))


def describe(config: Qwen2_5OmniThinkerConfig) -> str:
    """The decoder's size in words, with the model's name where it is one of `SIZES`."""
    text = config.text_config
    return describe_decoder(text.num_hidden_layers, text.hidden_size)


def describe_decoder(layers: int, hidden_size: int) -> str:
    """Like `describe`, from two numbers."""
    sizes = f"{layers} decoder layers of width {hidden_size}"
    name = official_name(layers, hidden_size)
    return f"{sizes} ({name})" if name else sizes


def official_name(layers: int, hidden_size: int) -> str | None:
    """Which of `SIZES` has a decoder of these sizes."""
    for name in SIZES.values():
        text = _resource(f"{name.lower()}.json")["text_config"]
        if (layers, hidden_size) == (text["num_hidden_layers"], text["hidden_size"]):
            return name
    return None


def _resource(name: str) -> dict[str, Any]:
    return json.loads(resources.files(__package__).joinpath(name).read_text(encoding="utf-8"))


def with_tokenizer(config: Qwen2_5OmniThinkerConfig, tokenizer_file: Path | str) -> Qwen2_5OmniThinkerConfig:
    """A copy of `config` whose vocabulary size and special ids are those of a `tokenizer.json`.

    Raises ModelError when a special token is missing. End of text is `<|im_end|>`, padding `<|endoftext|>`.
    """
    from tokenizers import Tokenizer

    path = Path(tokenizer_file)
    if not path.is_file():
        raise ModelError(f"no tokenizer at {path}: expected a tokenizer.json")
    tokenizer = Tokenizer.from_file(str(path))
    ids = {attribute: tokenizer.token_to_id(token) for attribute, token in TOKENS.items()}
    pad = tokenizer.token_to_id(PAD_TOKEN)
    missing = [TOKENS[a] for a, i in ids.items() if i is None] + ([PAD_TOKEN] if pad is None else [])
    if missing:
        raise ModelError(
            f"{path} lacks special tokens {', '.join(missing)}: they must be added when it is trained"
        )

    out = copy.deepcopy(config)
    for attribute, value in ids.items():
        setattr(out, attribute, value)
    user = tokenizer.encode("user", add_special_tokens=False).ids
    out.user_token_id = user[0]
    out.pad_token_id = out.text_config.pad_token_id = pad
    out.eos_token_id = out.text_config.eos_token_id = ids["im_end_token_id"]
    out.text_config.vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    return out


def special_ids(config: Qwen2_5OmniThinkerConfig) -> SpecialIds:
    """The special ids of a configuration made by `with_tokenizer`, in the runtime's form."""
    from crab_edge.prompt import SpecialIds

    missing = [a for a in (*TOKENS, "pad_token_id") if getattr(config, a, None) is None]
    if missing:
        raise ModelError(
            f"the model's config.json lacks {', '.join(missing)}: make it with model.with_tokenizer()"
        )
    return SpecialIds(
        audio=config.audio_token_index,
        audio_bos=config.audio_start_token_id,
        audio_eos=config.audio_end_token_id,
        vision_bos=config.vision_start_token_id,
        vision_eos=config.vision_end_token_id,
        image=config.image_token_index,
        video=config.video_token_index,
        im_start=config.im_start_token_id,
        im_end=config.im_end_token_id,
        pad=config.pad_token_id,
    )
