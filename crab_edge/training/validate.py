"""Quick looks at held-out scenes between stages: does it learn, and what. `crab-edge evaluate` is the real
measure.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from crab_edge.positions import next_position, tmrope
from crab_edge.prompt import PromptBuilder
from crab_edge.training.data import Scenes, Vocabulary, _audio, _visual, language_batch
from crab_edge.training.language import LanguageModule
from crab_edge.training.packing import IGNORE

_BOX = re.compile(r"\((\d+),(\d+)\)\((\d+),(\d+)\)")


@torch.no_grad()
def teacher_forced(
    module: LanguageModule, make: Callable[[int], Any], steps: int, autocast: Any, first: int = 0
) -> dict[str, float]:
    """Held-out share of answers whose every token is the argmax, and mean token accuracy (both %)."""
    module.eval()
    right = total = tokens = token_right = 0
    for step in range(first, first + steps):
        batch = make(step)
        with autocast():
            last = module.hidden(batch).last
            targets = batch["targets"]
            asked = targets != IGNORE
            guess = module.thinker.lm_head(last[asked]).argmax(dim=-1)
        ok = torch.ones_like(targets, dtype=torch.bool)
        ok[asked] = guess == targets[asked]
        tokens += int(asked.sum())
        token_right += int(ok[asked].sum())
        for row in range(targets.shape[0]):
            for number in range(1, int(batch["segment"][row].max()) + 1):
                own = (batch["segment"][row] == number) & asked[row]
                right += int(ok[row][own].all())
                total += 1
    module.train()
    return {"exact_forced": 100 * right / max(total, 1), "token_forced": 100 * token_right / max(tokens, 1)}


@torch.no_grad()
def generate(
    module: LanguageModule,
    builder: PromptBuilder,
    vocabulary: Vocabulary,
    scene: Any,
    lead: str,
    questions: Sequence[str],
    max_new_tokens: int = 64,
) -> list[str]:
    """Greedy answers with a KV cache: the prefix once, cropped back for every question."""
    thinker, cfg = module.thinker, builder.cfg
    text = thinker.model.language_model
    items = [m[0] for m in (f(scene, lead, cfg, vocabulary) for f in (_visual, _audio)) if m is not None]
    batch = language_batch([(scene, lead, [])], builder, vocabulary)
    cells, tokens = module.encode(batch)
    ids = batch["ids"]
    embeds = text.embed_tokens(ids)
    seen = (ids == builder.special.video) | (ids == builder.special.image)
    embeds = embeds.masked_scatter(seen[..., None], cells.to(embeds.dtype))
    embeds = embeds.masked_scatter((ids == builder.special.audio)[..., None], tokens.to(embeds.dtype))
    prefix = builder.prefix(lead, items)
    where = tmrope(prefix, builder.special, items, cfg)
    cache = DynamicCache(config=text.config)
    text(
        inputs_embeds=embeds,
        position_ids=torch.from_numpy(where)[:, None],
        past_key_values=cache,
        use_cache=True,
    )
    start, length, answers = next_position(where), len(prefix), []
    for question in questions:
        cache.crop(length - cache.get_seq_length()) if cache.get_seq_length() > length else None
        step_ids = torch.from_numpy(builder.suffix(question))[None]
        position, out = start, []
        for _ in range(max_new_tokens):
            n = step_ids.shape[1]
            at = (position + torch.arange(n)).expand(3, 1, n)
            x = text(
                inputs_embeds=text.embed_tokens(step_ids),
                position_ids=at,
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state[:, -1]
            position += n
            token = int(thinker.lm_head(x).argmax())
            if token in (builder.special.im_end, builder.special.pad):
                break
            out.append(token)
            step_ids = torch.tensor([[token]])
        answers.append(builder.decode(out).strip())
    return answers


def generated(
    module: LanguageModule,
    builder: PromptBuilder,
    vocabulary: Vocabulary,
    scenes: Scenes,
    count: int,
    autocast: Any,
    clip_every: int = 3,
) -> tuple[dict[str, float], list[str]]:
    """Generated answers on `count` held-out scenes: exact match by task, arig's label and IoU; and
    examples.
    """
    module.eval()
    right: dict[str, list[float]] = {}
    examples: list[str] = []
    for index in range(count):
        scene = scenes.clip(index) if index % clip_every == clip_every - 1 else scenes.still(index)
        lead = scene.samples[0].lead
        chosen = [s for s in scene.samples if s.lead == lead][:3]
        with autocast():
            answers = generate(module, builder, vocabulary, scene, lead, [s.instruction for s in chosen])
        for sample, answer in zip(chosen, answers, strict=True):
            right.setdefault(sample.task, []).append(float(answer == sample.answer.strip()))
            truth, said = _BOX.search(sample.answer), _BOX.search(answer)
            if truth:
                label = sample.answer.split(".")[0]
                right.setdefault("arig_label", []).append(float(answer.startswith(label + ".")))
                right.setdefault("arig_iou50", []).append(
                    float(said is not None and _iou(truth, said) >= 0.5)
                )
            if len(examples) < 12:
                examples.append(f"{sample.task}: {sample.answer}  ->  {answer}")
    module.train()
    return {f"{k}": 100 * float(np.mean(v)) for k, v in right.items()}, examples


def _iou(first: re.Match, second: re.Match) -> float:
    a, b = ([float(v) for v in m.groups()] for m in (first, second))
    w = min(a[2], b[2]) - max(a[0], b[0])
    h = min(a[3], b[3]) - max(a[1], b[1])
    inter = max(w, 0.0) * max(h, 0.0)
    areas = sum(max(r[2] - r[0], 0) * max(r[3] - r[1], 0) for r in (a, b))
    return inter / max(areas - inter, 1e-6)
