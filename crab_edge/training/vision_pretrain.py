"""Stage 2: the vision tower from scratch, under throw-away heads for class, objectness and box of every
cell.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crab_edge.training.heads import CellHead, box_error, box_iou
from crab_edge.training.towers import VisionGrid, vision_cells


def initialise_tower(tower: nn.Module) -> None:
    """A start that suits a narrow tower trained for minutes, in place.

    The patch embedding begins as a whitened DCT in opponent colours (a random projection of 1176 values to
    192 loses most of a patch), linears at 1/sqrt(fan in) instead of 0.02, which is tiny at this width.
    """
    with torch.no_grad():
        for name, module in tower.named_modules():
            if isinstance(module, nn.Linear):
                last = name.endswith(("attn.proj", "down_proj"))
                scale = (2 * len(tower.blocks)) ** -0.5 if last else 1.0
                nn.init.trunc_normal_(module.weight, std=scale * module.in_features**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        tower.merger.mlp[2].weight.mul_(0.2)
        weight = tower.patch_embed.proj.weight
        weight.copy_(_dct_filters(*weight.shape).to(weight))


def _dct_filters(count: int, channels: int, frames: int, height: int, width: int) -> Tensor:
    """Float32 [count, channels, frames, height, width]: lowest frequencies first, half of them luminance."""
    colours = torch.tensor([[1.0, 1, 1], [1, 0, -1], [1, -2, 1]])
    colours = colours / colours.norm(dim=1, keepdim=True)
    y, x = torch.arange(height) + 0.5, torch.arange(width) + 0.5
    order = sorted(((u * u + v * v) ** 0.5, u, v) for u in range(height) for v in range(width))
    shares = (count - 2 * (count // 4), count // 4, count // 4)
    out = []
    for colour, share in zip(colours, shares, strict=True):
        for frequency, u, v in order[:share]:
            basis = torch.outer((torch.pi * u * y / height).cos(), (torch.pi * v * x / width).cos())
            # Natural pictures fall off as 1/f: the gain evens the components out.
            gain = (0.5 + frequency) / 12.0 * (1.0 if not out[shares[0] - 1 :] else 2.0)
            plane = gain * basis / basis.norm()
            out.append((colour[:, None, None, None] * plane / frames).expand(3, frames, height, width))
    return torch.stack(out)


class VisionStageModule(nn.Module):
    """The tower under an FCOS-like head on its 64 merged cells (28 px each)."""

    def __init__(self, tower: nn.Module, prototypes: Tensor) -> None:
        super().__init__()
        self.tower = tower
        self.grid = VisionGrid(tower)
        self.head = CellHead(prototypes.shape[1], prototypes)
        for parameter in tower.parameters():
            parameter.requires_grad_(True)

    def groups(self) -> list[dict[str, Any]]:
        return [{"params": [p for p in self.parameters() if p.requires_grad]}]

    def predict(self, patches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Patches [n*256, 1176] -> class logits, objectness, boxes (see CellHead)."""
        return self.head(vision_cells(self.tower, patches, self.grid.to(patches.device)))

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        classes, objectness, boxes = self.predict(batch["patches"])
        label, weight = batch["cell_label"], batch["cell_weight"]
        inside = label >= 0
        found = F.binary_cross_entropy_with_logits(objectness, inside.float())
        w = weight[inside] / weight[inside].sum().clamp(min=1.0)
        which = (
            F.cross_entropy(classes[inside], label[inside], reduction="none", label_smoothing=0.1) * w
        ).sum()
        truth = batch["cell_box"][inside]
        box = (box_error(boxes[inside], truth) * w).sum()
        loss = which + found + box
        return {"loss": loss, "which": which.detach(), "found": found.detach(), "box": box.detach()}


@torch.no_grad()
def vision_accuracy(
    module: VisionStageModule, make: Any, steps: int, autocast: Any, first: int = 0
) -> dict[str, float]:
    """Held-out, at the centre cells of objects: class top-1, share of boxes with IoU >= 0.5, objectness
    F1.
    """
    module.eval()
    hit = good = total = 0.0
    tp = fp = fn = 0.0
    for step in range(first, first + steps):
        batch = make(step)
        with autocast():
            classes, objectness, boxes = module.predict(batch["patches"])
        inside = batch["cell_label"] >= 0
        centre = batch["cell_weight"] == 1
        hit += float((classes[centre].argmax(dim=-1) == batch["cell_label"][centre]).sum())
        good += float((box_iou(boxes[centre], batch["cell_box"][centre])[0] >= 0.5).sum())
        total += float(centre.sum())
        said = objectness > 0
        tp += float((said & inside).sum())
        fp += float((said & ~inside).sum())
        fn += float((~said & inside).sum())
    module.train()
    return {
        "cell_top1": 100 * hit / max(total, 1),
        "cell_iou50": 100 * good / max(total, 1),
        "object_f1": 100 * 2 * tp / max(2 * tp + fp + fn, 1),
    }
