"""Throw-away heads: what the towers and the lower decoder layers are taught before words are.

Class prototypes are fixed orthonormal directions of the model's width, number codes fixed Fourier features of
0..224. Towers learn to point at a prototype; the decoder's label and number rows start as the same vectors,
so that "which class" and "which pixel" need no new code when language training starts. The heads are dropped.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crab_edge.training.tokenizer import NUMBERS

CODE = 32
SIDE = 8
CELL = 28.0


def class_prototypes(n_classes: int, width: int, seed: int = 0) -> Tensor:
    """Orthonormal float32 [n_classes, width] (random unit rows when there are more classes than
    dimensions).
    """
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(max(n_classes, 1), width, generator=generator)
    if n_classes <= width:
        q, _ = torch.linalg.qr(rows.T)
        return q.T.contiguous()[:n_classes]
    return F.normalize(rows, dim=-1)


def number_codes() -> Tensor:
    """Fourier features of 0..224, float32 [225, 32], unit length: near numbers have near codes."""
    value = torch.arange(NUMBERS, dtype=torch.float32)[:, None]
    periods = torch.tensor(np.geomspace(6.0, 900.0, CODE // 2), dtype=torch.float32)
    angle = 2 * math.pi * value / periods
    return torch.cat((angle.cos(), angle.sin()), dim=-1) / math.sqrt(CODE / 2)


def lifted_number_codes(width: int, seed: int = 1) -> Tensor:
    """`number_codes` in `width` dimensions by a fixed rotation, float32 [225, width]."""
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(width, CODE, generator=generator))
    return number_codes() @ basis.T


def soft_numbers(values: Tensor, sigma: float) -> Tensor:
    """Gaussian targets over 0..224 around float `values` [n] -> [n, 225], rows sum to 1."""
    grid = torch.arange(NUMBERS, device=values.device, dtype=torch.float32)
    return F.softmax(-0.5 * ((grid[None] - values[:, None].float()) / max(sigma, 1e-3)) ** 2, dim=-1)


def cell_targets(boxes: np.ndarray, classes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Truth of the 64 cells of a 224x224 picture.

    boxes float32 [n, 4] pixels, classes int64 [n] -> (class int64 [64], -1 outside; box float32 [64, 4];
    weight float32 [64], 1 near an object's centre, .4 at its rim). A cell in several boxes takes the
    smallest.
    """
    label = np.full(SIDE * SIDE, -1, np.int64)
    target = np.zeros((SIDE * SIDE, 4), np.float32)
    weight = np.zeros(SIDE * SIDE, np.float32)
    if not len(boxes):
        return label, target, weight
    centre = (np.arange(SIDE) + 0.5) * CELL
    cy, cx = (a.ravel() for a in np.meshgrid(centre, centre, indexing="ij"))
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    for index in np.argsort(-area, kind="stable"):
        x1, y1, x2, y2 = boxes[index]
        mx, my, w, h = (x1 + x2) / 2, (y1 + y2) / 2, max(x2 - x1, 1.0), max(y2 - y1, 1.0)
        inside = (cx > x1) & (cx < x2) & (cy > y1) & (cy < y2)
        inside[np.argmin((cx - mx) ** 2 + (cy - my) ** 2)] = True
        near = (np.abs(cx - mx) < 0.3 * w) & (np.abs(cy - my) < 0.3 * h)
        near[np.argmin((cx - mx) ** 2 + (cy - my) ** 2)] = True
        label[inside] = classes[index]
        target[inside] = boxes[index]
        weight[inside] = np.where(near[inside], 1.0, 0.4)
    return label, target, weight


class ClassHead(nn.Module):
    """Cosine-free dot products with fixed prototypes, a learnt bias and a fixed scale."""

    def __init__(self, prototypes: Tensor, scale: float = 4.0, bias: float = 0.0) -> None:
        super().__init__()
        self.register_buffer("prototypes", prototypes.clone())
        self.scale = scale
        self.bias = nn.Parameter(torch.full((prototypes.shape[0],), bias))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., width] -> logits float32 [..., classes]."""
        return self.scale * F.linear(x.float(), self.prototypes) + self.bias


class CellHead(nn.Module):
    """Objectness, class and box distances of each cell (an FCOS head made of linears)."""

    def __init__(self, width: int, prototypes: Tensor) -> None:
        super().__init__()
        self.classes = ClassHead(prototypes)
        self.objectness = nn.Linear(width, 1)
        self.box = nn.Linear(width, 4)
        nn.init.constant_(self.objectness.bias, -1.5)
        nn.init.constant_(self.box.bias, 0.5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [n, 64, width] -> (class logits [n,64,C], objectness logits [n,64], boxes in pixels [n,64,4])."""
        x = x.float()
        centre = (torch.arange(SIDE, device=x.device) + 0.5) * CELL
        cy, cx = torch.meshgrid(centre, centre, indexing="ij")
        middle = torch.stack((cx, cy), dim=-1).reshape(1, SIDE * SIDE, 2)
        distance = self.box(x) * 112.0
        boxes = torch.cat((middle - distance[..., :2], middle + distance[..., 2:]), dim=-1)
        return self.classes(x), self.objectness(x)[..., 0], boxes


def box_iou(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Row-wise (IoU, generalised IoU) of boxes [n, 4]."""
    a = torch.cat((torch.minimum(a[:, :2], a[:, 2:]), torch.maximum(a[:, :2], a[:, 2:])), dim=-1)
    low, high = torch.maximum(a[:, :2], b[:, :2]), torch.minimum(a[:, 2:], b[:, 2:])
    inter = (high - low).clamp(min=0).prod(dim=-1)
    union = (a[:, 2:] - a[:, :2]).prod(dim=-1) + (b[:, 2:] - b[:, :2]).prod(dim=-1) - inter
    iou = inter / union.clamp(min=1e-6)
    hull = (torch.maximum(a[:, 2:], b[:, 2:]) - torch.minimum(a[:, :2], b[:, :2])).prod(dim=-1)
    return iou, iou - (hull - union) / hull.clamp(min=1e-6)


def box_error(boxes: Tensor, truth: Tensor) -> Tensor:
    """1 - generalised IoU plus a smooth distance, [n], of boxes [n, 4] in pixels of 224."""
    distance = F.smooth_l1_loss(boxes / 224, truth / 224, reduction="none", beta=0.05).sum(dim=-1)
    return 1 - box_iou(boxes, truth)[1] + 2 * distance


class NumberHead(nn.Module):
    """Distributions over 0..224 read off hidden states through the fixed number codes."""

    def __init__(self, width: int, outputs: int, scale: float = 12.0) -> None:
        super().__init__()
        self.outputs = outputs
        self.scale = scale
        self.project = nn.Linear(width, outputs * CODE)
        self.register_buffer("codes", number_codes())

    @torch.no_grad()
    def fit(self, x: Tensor, values: Tensor) -> None:
        """Least squares from x [n, width] to the codes of `values` [n, outputs] in 0..224; negative ones are
        left out. From random weights, what a state holds beside the number hides it for long.
        """
        weight, bias = self.project.weight, self.project.bias
        weight.zero_()
        bias.zero_()
        for output in range(self.outputs):
            known = values[:, output] >= 0
            if int(known.sum()) > 1:
                codes = self.codes[values[known, output].round().long().clamp(0, NUMBERS - 1)]
                rows = slice(output * CODE, (output + 1) * CODE)
                weight[rows], bias[rows] = _least_squares(x[known], codes)

    def forward(self, x: Tensor) -> Tensor:
        """x [n, width] -> logits float32 [n, outputs, 225]."""
        code = self.project(x.float()).reshape(x.shape[0], self.outputs, CODE)
        return self.scale * code @ self.codes.T


class BoxHead(nn.Module):
    """A box in the frame read linearly off a state: left, top, right, bottom in pixels of 224."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.project = nn.Linear(width, 4)
        self.scale = width**-0.5

    def forward(self, x: Tensor) -> Tensor:
        """x [n, width] -> boxes float32 [n, 4]."""
        return 224 * self.project(x.float() * self.scale)

    @torch.no_grad()
    def fit(self, x: Tensor, boxes: Tensor) -> None:
        """Least squares from x [n, width] to boxes [n, 4]."""
        weight, bias = _least_squares(x, boxes / 224)
        self.project.weight.copy_(weight / self.scale)
        self.project.bias.copy_(bias)


def _least_squares(x: Tensor, y: Tensor, ridge: float = 1e-2) -> tuple[Tensor, Tensor]:
    """(weight [outputs, width], bias [outputs]) of the linear map from x [n, width] to y [n, outputs]."""
    ones = torch.cat((x.float(), x.new_ones(len(x), 1, dtype=torch.float32)), dim=1)
    gram = ones.T @ ones + ridge * len(ones) * torch.eye(ones.shape[1], device=x.device)
    solved = torch.linalg.solve(gram, ones.T @ y.float())
    return solved[:-1].T, solved[-1]
