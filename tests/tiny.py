"""A small tokenizer with Qwen2.5-Omni's special tokens, for tests of any room."""

from functools import lru_cache
from pathlib import Path

SPECIALS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|AUDIO|>",
    "<|audio_bos|>",
    "<|audio_eos|>",
    "<|vision_bos|>",
    "<|vision_eos|>",
    "<|IMAGE|>",
    "<|VIDEO|>",
)
# Qwen2's rule for where merges may not cross.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
TEXTS = (
    "system\nYou are Qwen, a virtual human, capable of perceiving auditory and visual inputs.",
    "user\nThis is a video and an audio: assistant\n",
    "Please describe the events and time range that occurred in the video.",
    "The sounding object is dog. Its coordinates are <obj>(12,30)(200,210)</obj>.",
    "Therefore, the events and time range are <event>dog, (2 7)</event>",
    "<visual_event>dog,(0 5)</visual_event><audio_event>cat,(1 4)</audio_event><answer>yes</answer>",
)


@lru_cache(maxsize=1)
def _json() -> str:
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        trainers,
    )

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        min_frequency=1,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    return tokenizer.to_str()


def tiny_tokenizer(path: str | Path) -> Path:
    """Write a byte-level BPE `tokenizer.json` of about 400 ids; `path` is the file or an existing folder."""
    path = Path(path)
    if path.is_dir():
        path = path / "tokenizer.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_json(), encoding="utf-8")
    return path
