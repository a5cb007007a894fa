"""Names of weights: one canonical form, and the two generations of names that files and transformers use.

    canonical       language_model.layers.0.mlp ..         visual.*        audio_tower.*        lm_head.*
    official files  model.layers.0.mlp ..                  visual.*        audio_tower.*        lm_head.*
    transformers 5  model.language_model.layers.0.mlp ..   model.visual.*  model.audio_tower.*  lm_head.*

Official files put `thinker.` (base) or `base_model.model.` (adapter) before them.
"""

from __future__ import annotations

import re

DECODER, VISION, AUDIO = "language_model", "visual", "audio_tower"
PEFT_PREFIX = "base_model.model."
THINKER_PREFIX = "thinker."
# What a Qwen2.5-Omni directory holds beside the thinker: speech output, which Crab+ doesn't use.
OTHER_PARTS = ("talker.", "token2wav.")

_WRAPPERS = re.compile(r"^(base_model\.model\.|module\.|thinker\.)+")


def canonical(name: str) -> str:
    """A weight's or module's name without wrappers, the same for both generations of names."""
    name = _WRAPPERS.sub("", name)
    if not name.startswith("lm_head."):
        name = name.removeprefix("model.")
    # Older checkpoints call the decoder `model.*` only.
    if name.startswith(("layers.", "norm.", "embed_tokens.")):
        name = f"{DECODER}.{name}"
    return name


def official(name: str) -> str:
    """Canonical name -> the name in Crab+'s and Qwen2.5-Omni's files, without their prefix."""
    return re.sub(rf"^{DECODER}\.", "model.", name)


def transformers_name(name: str) -> str:
    """Canonical name -> the name in transformers 5's thinker."""
    return name if name.startswith("lm_head.") else f"model.{name}"
