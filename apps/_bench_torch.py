"""Times the float decoder in torch with the official I-LoRA formula and prints one JSON line.

It is transformers' own text decoder with adapters in every linear, each expert a product of its own, summed
in turn as the released code does: y += (g_i * B_i h) * s.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from crab_edge_apps._bench_timing import report

from crab_edge.memory import peak_bytes


def main() -> None:
    """Arguments: the shape as JSON, threads, context, steps, prefill tokens."""
    from crab_edge_apps._bench_decoder import DecoderShape

    shape = DecoderShape(**json.loads(sys.argv[1]))
    threads, context, steps, prefill = (int(value) for value in sys.argv[2:6])
    import torch

    torch.set_num_threads(threads)
    before = peak_bytes()
    decoder, head = build(shape, torch.bfloat16)
    cache: Any = None

    def run(tokens: int, past: int) -> None:
        positions = torch.arange(past, past + tokens).expand(3, 1, tokens)
        hidden = decoder(
            inputs_embeds=embeds[:, :tokens], position_ids=positions, past_key_values=cache, use_cache=True
        ).last_hidden_state
        head(hidden[:, -1])

    def chunk(tokens: int) -> None:
        nonlocal cache
        cache = new_cache()
        run(tokens, 0)

    from transformers import DynamicCache

    def new_cache() -> Any:
        return DynamicCache(config=decoder.config)

    embeds = torch.randn(1, max(prefill, context), shape.hidden).to(torch.bfloat16)
    with torch.inference_mode():
        chunk(context)
        report(lambda past: run(1, past), chunk, context=context, steps=steps, prefill=prefill, before=before)


def build(shape: Any, dtype: Any) -> tuple[Any, Any]:
    """The adapted text decoder and its head, filled with small numbers, in eval mode."""
    import torch
    from peft import get_peft_model
    from torch import nn
    from transformers.initialization import no_init_weights
    from transformers.models.qwen2_5_omni.configuration_qwen2_5_omni import Qwen2_5OmniTextConfig
    from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import Qwen2_5OmniThinkerTextModel

    from crab_edge.ilora.torch_layer import ILoRALinear
    from crab_edge.model import ILoRAConfig
    from crab_edge.model.adapter import TARGETS

    half = shape.head_dim // 2
    config = Qwen2_5OmniTextConfig(
        # The decoder is fed embeddings; their table would only take memory.
        vocab_size=8,
        pad_token_id=0,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": [half // 4, half * 3 // 8, half - half // 4 - half * 3 // 8],
        },
    )
    with no_init_weights(), torch.device("meta"):
        decoder = Qwen2_5OmniThinkerTextModel._from_config(config, dtype=dtype)
        adapter = ILoRAConfig(
            r=shape.rank,
            lora_alpha=2 * shape.rank,
            num_experts=shape.experts,
            lora_dropout=0.0,
            target_modules=sorted(TARGETS),
        )
        if shape.rank:
            decoder = get_peft_model(decoder, adapter).get_base_model()
        head = nn.Linear(shape.hidden, shape.vocab, bias=False)
    decoder, head = (module.to(dtype).to_empty(device="cpu").eval() for module in (decoder, head))
    official = _official_linear()
    for module in decoder.modules():
        if isinstance(module, ILoRALinear):
            module.__class__ = official
    # Rotary frequencies are buffers that `to_empty` left unset.
    decoder.rotary_emb = type(decoder.rotary_emb)(decoder.config)
    pattern = torch.randn(1 << 20).mul_(0.02).to(dtype)
    with torch.no_grad():
        for weight in (*decoder.parameters(), *head.parameters()):
            flat = weight.view(-1)
            for start in range(0, len(flat), len(pattern)):
                part = flat[start : start + len(pattern)]
                part.copy_(pattern[: len(part)])
    return decoder, head


def _official_linear() -> type:
    """`ILoRALinear` with the released code's arithmetic instead of one product over all experts."""
    import torch
    from torch.nn import functional as F

    from crab_edge.ilora.torch_layer import ILoRALinear

    class OfficialILoRALinear(ILoRALinear):
        def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
            y = self.base_layer(x, *args, **kwargs)
            for name in self.active_adapters:
                gate = F.softmax(self.lora_route[name](x), dim=-1, dtype=torch.float32).to(y.dtype)
                down = self.lora_A[name](self.lora_dropout[name](x))
                for i, expert in enumerate(self.experts(name)):
                    y = y + gate[..., i : i + 1] * expert(down) * self.scaling(name)
            return y

    return OfficialILoRALinear


if __name__ == "__main__":
    main()
