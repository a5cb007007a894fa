"""Stages 3 and 4: the decoder on packed questions, then I-LoRA on the frozen base.

Towers are frozen in both (the base stage may train their last projections). Beside the answer's
cross-entropy the base stage has throw-away heads on the hidden states of a middle layer: each cell tells
its object's class and absolute box, each audio token who sounds, in which second, since when, and in silence
when the last sound ended. They are dropped with the stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crab_edge.prompt import SpecialIds
from crab_edge.training.heads import BoxHead, ClassHead, NumberHead, box_error, soft_numbers
from crab_edge.training.packing import IGNORE, attention_mask
from crab_edge.training.pointing import Hidden, Pointing
from crab_edge.training.towers import VisionGrid, audio_hidden, vision_hidden, vision_merge

#: Weight of what answers say of boxes among the losses that teach them to.
_BOXES = 3.0


def decode(
    text: nn.Module, embeds: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """The official decoder over embeddings [B, S, H], mask bool [B, 1, S, S].

    Returns the normalised last hidden states [B, S, H] and what enters layer 0, 1, ... and the norm.
    """
    states = [embeds]
    for layer in text.layers:
        x = layer(states[-1], attention_mask=mask, position_embeddings=rotary)
        states.append(x[0] if isinstance(x, tuple) else x)
    return text.norm(states[-1]), states


class Auxiliary(nn.Module):
    """The throw-away heads of a middle layer."""

    def __init__(self, width: int, prototypes: Tensor) -> None:
        super().__init__()
        # Behind RMSNorm a state is sqrt(width) long: this scale keeps the first logits small.
        scale = 12.0 * width**-0.5
        self.cell_class = ClassHead(prototypes, scale=scale)
        self.cell_box = BoxHead(width)
        self.heard = ClassHead(prototypes, scale=scale, bias=-4.0)
        self.second = NumberHead(width, 3)

    def forward(self, cells: Tensor, tokens: Tensor, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """cells [n, 64, H] and audio tokens [m, H] after layer k, with the batch's truth."""
        cells, tokens = (F.rms_norm(x.float(), x.shape[-1:]) for x in (cells, tokens))
        zero = cells.sum() * 0 + tokens.sum() * 0
        names = ("aux_class", "aux_box", "aux_heard", "aux_second", "aux_began", "aux_ended")
        out = dict.fromkeys(names, zero)
        label, weight = batch["cell_label"], batch["cell_weight"]
        inside = label >= 0
        if bool(inside.any()):
            chosen, w = cells[inside], weight[inside] / weight[inside].sum()
            out["aux_class"] = (
                F.cross_entropy(self.cell_class(chosen), label[inside], reduction="none") * w
            ).sum()
            out["aux_box"] = (box_error(self.cell_box(chosen), batch["cell_box"][inside]) * w).sum()
        if tokens.shape[0]:
            truth = batch["activity"].float()
            each = F.binary_cross_entropy_with_logits(self.heard(tokens), truth, reduction="none")
            out["aux_heard"] = each.sum(dim=-1).mean()
            when = torch.cat((batch["second"][:, None], batch["span"]), dim=1)
            logits = self.second(tokens)
            for place, name in enumerate(("aux_second", "aux_began", "aux_ended")):
                known = when[:, place] >= 0
                if bool(known.any()):
                    out[name] = F.cross_entropy(logits[known, place], when[known, place])
        return out


class LanguageModule(nn.Module):
    """A thinker (plain or under PEFT) trained on packed batches of `data.language_batch`."""

    def __init__(
        self,
        model: nn.Module,
        special: SpecialIds,
        numbers: Sequence[int],
        *,
        prototypes: Tensor | None = None,
        labels: Sequence[int] = (),
        auxiliary: float = 0.0,
        auxiliary_layer: int = 3,
        soft_pixels: float = 0.0,
        pointing: float = 0.0,
        train_projections: bool = False,
        train_towers: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        inner = getattr(model, "base_model", None)
        # PEFT's get_base_model unwraps one level; a bare thinker's base_model is its own inner model.
        self._thinker = [inner.model if inner is not None and hasattr(model, "peft_config") else model]
        self.special = special
        self.grid = VisionGrid(self.thinker.model.visual)
        self.layer, self.weight, self.sigma = auxiliary_layer, auxiliary, soft_pixels
        self.projections, self.towers = train_projections, train_towers
        self.register_buffer("numbers", torch.tensor(list(numbers)), persistent=False)
        width = self.thinker.config.text_config.hidden_size
        self.auxiliary = Auxiliary(width, prototypes) if auxiliary > 0 and prototypes is not None else None
        self.pointing_weight = pointing
        last = self.thinker.config.text_config.num_hidden_layers - 1
        self.pointing = (
            Pointing(prototypes, labels, min(auxiliary_layer, last))
            if pointing > 0 and prototypes is not None
            else None
        )

    @property
    def thinker(self) -> nn.Module:
        """The thinker inside PEFT's wrapping."""
        return self._thinker[0]

    def encode(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(cells [n, 64, H], audio tokens [m, H]) of a batch."""
        visual, audio = self.thinker.model.visual, self.thinker.model.audio_tower
        width = self.thinker.config.text_config.hidden_size
        patches, chunks, lengths = batch["patches"], batch["chunks"], batch["lengths"]
        last = self.projections or self.towers
        cells, tokens = patches.new_zeros(0, 64, width), patches.new_zeros(0, width)
        if patches.shape[0]:
            with torch.set_grad_enabled(self.towers and torch.is_grad_enabled()):
                x = vision_hidden(visual, patches, self.grid.to(patches.device))
            with torch.set_grad_enabled(last and torch.is_grad_enabled()):
                cells = vision_merge(visual, x, self.grid)
        if chunks.shape[0]:
            with torch.set_grad_enabled(self.towers and torch.is_grad_enabled()):
                x = audio_hidden(audio, chunks, lengths)
                x = x.reshape(x.shape[0], x.shape[1] // 2, 2, -1).mean(dim=2)
            valid = torch.arange(x.shape[1], device=x.device)[None] < (((lengths - 1) // 2 + 1) // 2)[:, None]
            with torch.set_grad_enabled(last and torch.is_grad_enabled()):
                tokens = audio.proj(audio.ln_post(x))[valid]
        return cells, tokens

    def hidden(self, batch: dict[str, Tensor]) -> Hidden:
        """The decoder's states over a batch."""
        ids = batch["ids"]
        cells, tokens = self.encode(batch)
        text = self.thinker.model.language_model
        embeds = text.embed_tokens(ids)
        seen = (ids == self.special.video) | (ids == self.special.image)
        heard = ids == self.special.audio
        embeds = embeds.masked_scatter(seen[..., None], cells.to(embeds.dtype))
        embeds = embeds.masked_scatter(heard[..., None], tokens.to(embeds.dtype))
        rotary = text.rotary_emb(embeds, batch["positions"])
        mask = attention_mask(batch["segment"])
        last, states = decode(text, embeds, rotary, mask)
        return Hidden(last, states, seen, heard, mask, rotary)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        found = self.hidden(batch)
        targets = batch["targets"]
        asked = targets != IGNORE
        logits = self.thinker.lm_head(found.last[asked]).float()
        truth, pixel = targets[asked], batch["pixels"][asked]
        each = F.cross_entropy(logits, truth, reduction="none")
        if self.sigma > 0 and bool(pixel.any()):
            values = (self.numbers[None] == truth[pixel][:, None]).float().argmax(dim=-1)
            log_p = F.log_softmax(logits[pixel], dim=-1)[:, self.numbers]
            each = each.masked_scatter(pixel, -(soft_numbers(values, self.sigma) * log_p).sum(dim=-1))
        answer = each.mean()
        out = {"loss": answer, "answer": answer.detach()}
        boxes = each[pixel].mean() if bool(pixel.any()) else None
        if boxes is not None:
            out["answer_box"] = boxes.detach()
        extra: dict[str, Tensor] = {}
        if self.auxiliary is not None:
            middle = found.states[self.layer]
            cells = middle[found.seen].reshape(-1, 64, middle.shape[-1])
            extra = self.auxiliary(cells, middle[found.heard], batch)
            out["loss"] = answer + self.weight * sum(extra.values())
        if self.pointing is not None:
            shown = self.pointing(self.thinker.model.language_model, found, batch, self.numbers)
            # Coordinates are a few tokens among many: they get a loss of their own.
            total = sum(shown.values()) + (0.0 if boxes is None else _BOXES * boxes)
            out["loss"] = out["loss"] + self.pointing_weight * total
            extra |= shown
        out.update({name: value.detach() for name, value in extra.items()})
        return out

    def _hold_clocks(self, text: list[nn.Parameter]) -> list[nn.Parameter]:
        """Keep the first attention as it starts, with the embeddings its keys look for.

        Its weights are small: an optimizer that moves every weight alike would undo it within a few steps.
        """
        first = self.thinker.model.language_model.layers[0]
        held = [*first.self_attn.parameters(), *first.input_layernorm.parameters()]
        for parameter in held:
            parameter.requires_grad_(False)
        special = self.special
        rows = [special.im_start, special.vision_bos, special.audio_bos]

        def without(gradient: Tensor) -> Tensor:
            gradient = gradient.clone()
            gradient[rows] = 0
            return gradient

        self.thinker.model.language_model.embed_tokens.weight.register_hook(without)
        ids = {id(parameter) for parameter in held}
        return [parameter for parameter in text if id(parameter) not in ids]

    def base_groups(self, hold_clocks: bool = False) -> list[dict[str, Any]]:
        """Freeze what the base stage leaves, and group the rest: projections of the towers learn more
        slowly.
        """
        thinker = self.thinker
        thinker.requires_grad_(False)
        text = [*thinker.model.language_model.parameters(), *thinker.lm_head.parameters()]
        last = []
        if self.projections:
            audio = thinker.model.audio_tower
            last = [
                *thinker.model.visual.merger.parameters(),
                *audio.proj.parameters(),
                *audio.ln_post.parameters(),
            ]
        for parameter in (*text, *last):
            parameter.requires_grad_(True)
        if hold_clocks:
            text = self._hold_clocks(text)
        heads, boxes = [], []
        if self.auxiliary is not None:
            boxes = list(self.auxiliary.cell_box.parameters())
            heads = [p for n, p in self.auxiliary.named_parameters() if not n.startswith("cell_box.")]
        if self.pointing is not None:
            boxes += self.pointing.box.parameters()
            heads += [p for n, p in self.pointing.named_parameters() if not n.startswith("box.")]
        groups = [
            {"params": [p for p in text if p.ndim > 1]},
            {"params": [p for p in text if p.ndim == 1], "weight_decay": 0.0},
            # Inputs sqrt(width) long and codes scaled by 12: full steps would shake a number head.
            {"params": heads, "lr_scale": 0.3},
            # A box head's inputs have length 1: its weights are larger and must follow as the states grow.
            {"params": boxes, "lr_scale": 4.0},
        ]
        groups = [g for g in groups if g["params"]]
        return [*groups, {"params": last, "lr_scale": 0.3}] if last else groups

    def adapter_groups(self) -> list[dict[str, Any]]:
        """Everything that the adapter left trainable."""
        return [{"params": [p for p in self.parameters() if p.requires_grad]}]


def fit_heads(module: LanguageModule, batches: Sequence[dict[str, Tensor]]) -> None:
    """Start the throw-away number heads at least squares over the untrained decoder's states."""
    heads = module.auxiliary
    if heads is None:
        return
    cells, boxes, tokens, times = [], [], [], []
    with torch.no_grad():
        for batch in batches:
            found = module.hidden(batch)
            middle = found.states[module.layer]
            states = F.rms_norm(middle.float(), middle.shape[-1:])
            inside = batch["cell_label"] >= 0
            cells.append(states[found.seen].reshape(*inside.shape, states.shape[-1])[inside])
            boxes.append(batch["cell_box"][inside])
            tokens.append(states[found.heard])
            times.append(torch.cat((batch["second"][:, None], batch["span"]), dim=1))
    heads.cell_box.fit(torch.cat(cells), torch.cat(boxes))
    heads.second.fit(torch.cat(tokens), torch.cat(times))


def centre_projections(module: LanguageModule, batches: Sequence[dict[str, Tensor]]) -> None:
    """Take the mean over `batches` out of what both encoders say, in the biases of their last linears.

    Heads with a bias of their own let the encoders put most of an embedding into one constant vector; behind
    the decoder's RMSNorm it would hide the part that differs.
    """
    cells, tokens = [], []
    with torch.no_grad():
        for batch in batches:
            seen, heard = module.encode(batch)
            cells.append(seen.flatten(0, 1))
            tokens.append(heard)
        last = module.thinker.model.visual.merger.mlp[2], module.thinker.model.audio_tower.proj
        for linear, said in zip(last, (torch.cat(cells), torch.cat(tokens)), strict=True):
            if len(said):
                linear.bias.sub_(said.mean(dim=0))
