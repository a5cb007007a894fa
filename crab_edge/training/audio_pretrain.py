"""Stage 1: the audio tower, from Whisper tiny.en's encoder to tokens that say who sounds when."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crab_edge.training.heads import ClassHead
from crab_edge.training.towers import audio_tokens


class AudioStageModule(nn.Module):
    """The tower under a throw-away head: every class, on or off, at every 40 ms token."""

    def __init__(self, tower: nn.Module, prototypes: Tensor, freeze_layers: int = 0) -> None:
        super().__init__()
        self.tower = tower
        self.head = ClassHead(prototypes, bias=-4.0)
        for parameter in tower.parameters():
            parameter.requires_grad_(True)
        frozen = [tower.audio_bos_eos_token]
        if freeze_layers:
            frozen += [tower.conv1, tower.conv2, *tower.layers[: freeze_layers - 1]]
        for module in frozen:
            module.requires_grad_(False)

    def groups(self) -> list[dict[str, Any]]:
        """The new projection and head learn five times as fast as the pretrained layers."""
        new = [*self.tower.proj.parameters(), *self.head.parameters()]
        ids = {id(p) for p in new}
        old = [p for p in self.tower.parameters() if p.requires_grad and id(p) not in ids]
        return [{"params": old, "lr_scale": 1.0}, {"params": new, "lr_scale": 5.0}]

    def logits(self, batch: dict[str, Tensor]) -> Tensor:
        """Float32 [tokens, classes]."""
        tokens, valid = audio_tokens(self.tower, batch["chunks"], batch["lengths"])
        return self.head(tokens[valid])

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        logits, truth = self.logits(batch), batch["activity"].float()
        each = F.binary_cross_entropy_with_logits(logits, truth, reduction="none").sum(dim=-1).mean()
        # Which of the classes: a softmax over classes at tokens where something sounds sharpens confusions.
        sounding = truth.sum(dim=-1) > 0
        share = truth[sounding] / truth[sounding].sum(dim=-1, keepdim=True)
        which = F.cross_entropy(logits[sounding], share) if bool(sounding.any()) else logits.sum() * 0
        return {"loss": each + which, "activity": each.detach(), "which": which.detach()}


@torch.no_grad()
def audio_accuracy(
    module: AudioStageModule, make: Any, steps: int, autocast: Any, first: int = 0
) -> dict[str, float]:
    """Held-out: share of clips whose loudest class (mean logit) truly sounds; F1 of token activity at 0.5."""
    module.eval()
    hit = total = 0
    tp = fp = fn = 0.0
    for step in range(first, first + steps):
        batch = make(step)
        with autocast():
            logits = module.logits(batch)
        truth = batch["activity"].bool()
        said = logits > 0
        tp += float((said & truth).sum())
        fp += float((said & ~truth).sum())
        fn += float((~said & truth).sum())
        for clip in batch["clip"].unique():
            own = batch["clip"] == clip
            if bool(truth[own].any()):
                best = int(logits[own].sigmoid().mean(dim=0).argmax())
                hit += int(bool(truth[own][:, best].any()))
                total += 1
    module.train()
    return {"audio_top1": 100 * hit / max(total, 1), "audio_f1": 100 * 2 * tp / max(2 * tp + fp + fn, 1)}
