"""The chat text of Qwen2.5-Omni as Crab+ uses it, as token ids.

A prompt is a prefix (system, user, lead sentence, media placeholders) and a suffix (instruction, start of the
answer). Media come first and end in a special token, so prefix + suffix is the tokenisation of the whole text
and all questions about the same media share the prefix.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from crab_edge.errors import BundleError
from crab_edge.features import FeatureConfig, audio_token_count, vision_token_count

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MediaKind = Literal["video", "image", "audio"]

# The vocabulary's names of the special tokens, by the field of `SpecialIds`.
SPECIAL_TOKENS = {
    "audio": "<|AUDIO|>",
    "audio_bos": "<|audio_bos|>",
    "audio_eos": "<|audio_eos|>",
    "vision_bos": "<|vision_bos|>",
    "vision_eos": "<|vision_eos|>",
    "image": "<|IMAGE|>",
    "video": "<|VIDEO|>",
    "im_start": "<|im_start|>",
    "im_end": "<|im_end|>",
    "pad": "<|endoftext|>",
}


class SpecialIds(BaseModel):
    """Ids of the special tokens in one vocabulary. The answer ends at `im_end` or `pad`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    audio: int
    audio_bos: int
    audio_eos: int
    vision_bos: int
    vision_eos: int
    image: int
    video: int
    im_start: int
    im_end: int
    pad: int


@dataclass(frozen=True)
class MediaItem:
    """One medium in the prompt: `tokens` placeholders; `grid` is (T, H, W) in patches, None for audio."""

    kind: MediaKind
    tokens: int
    grid: tuple[int, int, int] | None = None

    @classmethod
    def visual(
        cls, kind: Literal["video", "image"], grid: tuple[int, int, int], cfg: FeatureConfig
    ) -> MediaItem:
        """A video or an image whose patches have this grid."""
        return cls(kind, vision_token_count(grid, cfg), grid)

    @classmethod
    def audio(cls, mel_frames: int) -> MediaItem:
        """A sound whose spectrogram has so many frames."""
        return cls("audio", audio_token_count(mel_frames))


# A character has at most four bytes; a longer run without an end isn't UTF-8 and is shown as it is.
_LONGEST_WAIT = 8


class PromptBuilder:
    """Builds prompts and reads answers with a model's own tokenizer.

    tokenizer_file: `tokenizer.json` of the `tokenizers` library. BundleError if it can't be read or lacks one
    of the special tokens.
    """

    def __init__(self, tokenizer_file: str | Path, cfg: FeatureConfig) -> None:
        from tokenizers import Tokenizer

        path = Path(tokenizer_file)
        try:
            self._tokenizer: Tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # all that the library raises
            raise BundleError(f"{path}: not a readable tokenizer.json ({error}); export again") from error
        ids: dict[str, int] = {}
        for field, token in SPECIAL_TOKENS.items():
            value = self._tokenizer.token_to_id(token)
            if value is not None:
                ids[field] = value
        missing = [token for field, token in SPECIAL_TOKENS.items() if field not in ids]
        if missing:
            raise BundleError(
                f"{path}: the vocabulary lacks {', '.join(missing)}; export with a Qwen2.5-Omni tokenizer"
            )
        # What people type is text, also where it spells a special token: those come from `special` only.
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.special = SpecialIds(**ids)
        added = self._tokenizer.get_added_tokens_decoder()
        self._specials = {i: token.content for i, token in added.items() if token.special}
        self.cfg = cfg

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def tokenizer_json(self) -> str:
        """The tokenizer as `tokenizer.json` has it, for other libraries that read this form."""
        return self._tokenizer.to_str()

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; special tokens spelled in it are not recognised."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids, without the special tokens."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The text of each id: special tokens by their name, the others so that they join to `decode`.

        Where a character is spread over several ids, it stands at the last of them and the others are "".
        """
        out: list[str] = []
        text = self.stream_decoder()
        for i in map(int, ids):
            if i in self._specials:
                if out:
                    out[-1] += text.finish()
                text = self.stream_decoder()
                out.append(self._specials[i])
            else:
                out.append(text.push(i))
        if out:
            out[-1] += text.finish()
        return out

    def prefix(self, lead: str, items: Sequence[MediaItem]) -> NDArray[np.int64]:
        """int64 [S]: system prompt, start of the user's turn, lead sentence, every medium's placeholders."""
        s = self.special
        ids = [s.im_start, *self.encode(f"system\n{self.cfg.system_prompt}"), s.im_end, *self.encode("\n")]
        ids += [s.im_start, *self.encode(f"user\n{lead}")]
        for item in items:
            if item.kind == "audio":
                ids += [s.audio_bos, *[s.audio] * item.tokens, s.audio_eos]
            else:
                placeholder = s.video if item.kind == "video" else s.image
                ids += [s.vision_bos, *[placeholder] * item.tokens, s.vision_eos]
        return np.array(ids, np.int64)

    def suffix(self, instruction: str) -> NDArray[np.int64]:
        """int64 [S]: the instruction, end of the user's turn, start of the assistant's."""
        s = self.special
        ids = [
            *self.encode(instruction),
            s.im_end,
            *self.encode("\n"),
            s.im_start,
            *self.encode("assistant\n"),
        ]
        return np.array(ids, np.int64)

    def stream_decoder(self) -> StreamDecoder:
        """A fresh decoder of one answer, token by token."""
        return StreamDecoder(self)


class StreamDecoder:
    """Turns tokens into text as they come: the pieces join to `decode` of all ids, no character in halves."""

    def __init__(self, builder: PromptBuilder) -> None:
        self._builder = builder
        # Decoders treat a text's first token differently (leading blank), so a few past ones stay as context.
        self._context: list[int] = []
        self._pending: list[int] = []

    def push(self, token: int) -> str:
        """Take one id; returns the text that is now certain, maybe none."""
        self._pending.append(int(token))
        return self._take(final=False)

    def finish(self) -> str:
        """The rest when the answer ends inside a character (shown as U+FFFD), mostly none."""
        return self._take(final=True) if self._pending else ""

    def _take(self, final: bool) -> str:
        before = self._builder.decode(self._context)
        text = self._builder.decode(self._context + self._pending)
        if text.endswith("\ufffd") and not final and len(self._pending) < _LONGEST_WAIT:
            return ""
        if len(text) > len(before):
            self._context = self._pending
        self._pending = []
        return text[len(before) :]
