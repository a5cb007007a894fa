"""The small model's own tokenizer: byte-level BPE, whole numbers and whole labels as single tokens.

About 2,000 entries: 256 bytes, the integers 0..224 (pixels, seconds, counts), one entry for each label, and
merges learnt from the answers, the instructions and plain English. Byte-level, so every Unicode text has
ids and decodes back to itself. Special tokens carry Qwen's names.
"""

from __future__ import annotations

import pydoc
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from crab_edge.errors import InputError
from crab_edge.prompt import SPECIAL_TOKENS

# The padding token first, as in Qwen's own numbering.
SPECIAL = tuple(sorted(SPECIAL_TOKENS.values(), key=lambda token: token != SPECIAL_TOKENS["pad"]))
NUMBERS = 225
_WORDS = r"'(?:s|t|re|ve|m|ll|d)|[^\r\n\p{L}\p{N}<>]?\p{L}+|\p{N}{1,3}|</?| ?[^\s\p{L}\p{N}<>]+|\s+"


def plain_english() -> list[str]:
    """English prose that every Python carries (the language reference kept by `pydoc`)."""
    pydoc.Helper  # noqa: B018  # the module must be importable; its topics are what we read
    from pydoc_data.topics import topics

    return [
        line for text in topics.values() for line in text.split("\n") if line and not line.startswith(" ")
    ]


def train_tokenizer(texts: Iterable[str], labels: Sequence[str], vocab_size: int = 2048) -> Tokenizer:
    """A tokenizer of exactly `vocab_size` entries.

    `texts` are the answers and instructions of the training data, `labels` the class names; each label
    becomes one entry that only matches whole words. InputError when the fixed entries alone exceed
    `vocab_size`.
    """
    labels = sorted({label for label in labels if label and not re.fullmatch(r"\d+", label)})
    fixed = 256 + (NUMBERS - 10) + len(SPECIAL) + len(labels)
    if fixed > vocab_size:
        raise InputError(
            f"vocab_size is {vocab_size}, but bytes, numbers, labels alone need {fixed}: raise it"
        )
    split = pre_tokenizers.Split(Regex(_WORDS), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    learner = Tokenizer(models.BPE())
    # Digits apart while learning, so that no merge competes with the whole numbers added below.
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.Digits(individual_digits=True), byte_level]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - (fixed - 256),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=2,
        show_progress=False,
    )
    own = list(texts)
    learner.train_from_iterator(own * 4 + plain_english(), trainer)
    state = _model_state(learner)
    vocab: dict[str, int] = dict(sorted(state["vocab"].items(), key=lambda item: item[1]))
    for number in range(NUMBERS):
        vocab.setdefault(str(number), len(vocab))
    merges = [tuple(m) if isinstance(m, (list, tuple)) else tuple(m.split(" ")) for m in state["merges"]]
    # ignore_merges: a pre-token that is an entry becomes that entry, which is how numbers stay whole.
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    tokenizer.add_tokens([AddedToken(t, single_word=True, normalized=False) for t in labels])
    spare = vocab_size - tokenizer.get_vocab_size(with_added_tokens=True)
    if spare > 0:
        tokenizer.add_special_tokens(
            [AddedToken(f"<|spare_{i}|>", special=True, normalized=False) for i in range(spare)]
        )
    return tokenizer


def _model_state(tokenizer: Tokenizer) -> dict:
    import json

    return json.loads(tokenizer.to_str())["model"]


def number_ids(tokenizer: Tokenizer) -> list[int]:
    """Token ids of the integers 0..224, in order; InputError when one isn't a single token."""
    out = []
    for number in range(NUMBERS):
        ids = tokenizer.encode(str(number), add_special_tokens=False).ids
        if len(ids) != 1:
            raise InputError(
                f"the number {number} is {len(ids)} tokens, expected 1: train the tokenizer anew"
            )
        out.append(ids[0])
    return out


def label_ids(tokenizer: Tokenizer, labels: Sequence[str]) -> list[int]:
    """Token id of each label; InputError when one isn't a single token."""
    out = []
    for label in labels:
        ids = tokenizer.encode(label, add_special_tokens=False).ids
        if len(ids) != 1:
            raise InputError(
                f"the label {label!r} is {len(ids)} tokens, expected 1: train the tokenizer anew"
            )
        out.append(ids[0])
    return out


def save_tokenizer(tokenizer: Tokenizer, path: Path) -> Path:
    """Write `tokenizer.json`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path))
    return path
