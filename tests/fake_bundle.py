"""A bundle with empty graphs and an engine that says what a test wants: sessions without a model."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.tiny import tiny_tokenizer

HIDDEN = 8


def fake_manifest(vocab_size: int, eos_ids: list[int], **model):
    """A manifest for `vocab_size` ids and width 8."""
    from crab_edge.manifest import Manifest

    sizes = {"hidden_size": HIDDEN, "layers": 1, "kv_heads": 1, "head_dim": 8, "max_positions": 4096}
    recipe = {"name": "w4", "bits": 4, "block": 32, "accuracy_level": 4, "experts": "unfolded8"}
    bits = {"adapter_bits": 8, "head_bits": 8, "embedding_bits": 8, "tower_bits": 8, "kv_dtype": "float32"}
    content = {
        "name": "fake",
        "vocab_size": vocab_size,
        "n_parameters": 1,
        "eos_ids": eos_ids,
        **sizes,
        **model,
    }
    return Manifest.model_validate({"model": content, "recipe": recipe | bits})


def write_fake_bundle(out: Path, overwrite: bool = False, **model) -> Path:
    """Publish the bundle `out`; `model` overrides fields of the manifest's model."""
    from crab_edge.bundle import BundleWriter
    from crab_edge.features import FeatureConfig
    from crab_edge.prompt import PromptBuilder

    cfg = FeatureConfig(system_prompt="You see and hear.")
    with BundleWriter(out, overwrite=overwrite) as writer:
        tokenizer = tiny_tokenizer(writer.path("tokenizer.json"))
        prompt = PromptBuilder(tokenizer, cfg)
        cfg.save(writer.path("features.json"))
        random = np.random.default_rng(0)
        rows = random.integers(-127, 128, (prompt.vocab_size, HIDDEN)).astype(np.int8)
        scales = random.random(prompt.vocab_size, np.float32)
        writer.path("embedding.bin").write_bytes(rows.tobytes() + scales.tobytes())
        for name in ("decoder", "audio", "vision"):
            writer.path(f"{name}.onnx").write_bytes(name.encode() * 10)
        return writer.commit(fake_manifest(prompt.vocab_size, [prompt.special.im_end], **model))


class FakeEngine:
    """Says `answers` in turn, one a prompt (a list, or one text for all), and notes what it was given."""

    name = "fake"

    def __init__(self, bundle, answers="") -> None:
        self._prompt = bundle.prompt
        self._model = bundle.manifest.model
        self._answers = answers
        self.length = 0
        self.prompts = 0
        self._said = 0
        self.vision_calls: list[int] = []
        self.audio_calls: list[int] = []
        self.forwards: list[tuple[int, np.ndarray, np.ndarray]] = []
        self.broken = False

    def vision(self, pixel_values):
        self.vision_calls.append(len(pixel_values))
        return np.full((len(pixel_values) // 4, HIDDEN), 1000 + len(self.vision_calls), np.float32)

    def audio(self, chunks, lengths):
        from crab_edge.features import audio_token_count

        self.audio_calls.append(int(lengths.sum()))
        return np.full(
            (audio_token_count(int(lengths.sum())), HIDDEN), 2000 + len(self.audio_calls), np.float32
        )

    def rewind(self, length):
        assert 0 <= length <= self.length
        self.length = length
        self.prompts += 1
        self._said = 0

    def forward(self, embeds, position_ids):
        assert embeds.dtype == np.float32 and position_ids.dtype == np.int64
        assert embeds.shape[0] == 1 and position_ids.shape == (3, 1, embeds.shape[1])
        self.forwards.append((self.length, embeds[0].copy(), position_ids[:, 0].copy()))
        self.length += embeds.shape[1]
        logits = np.zeros(self._model.vocab_size, np.float32)
        if self.broken:
            logits[:] = np.nan
            return logits
        if embeds.shape[1] == 1:
            self._said += 1
        text = self._answers if isinstance(self._answers, str) else self._answers[self.prompts - 1]
        ids = [*self._prompt.encode(text), self._model.eos_ids[0]]
        logits[ids[min(self._said, len(ids) - 1)]] = 1
        return logits

    def describe(self):
        return {"name": self.name}
