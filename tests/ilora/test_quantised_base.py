"""I-LoRA on bitsandbytes' quantised linears, on the CPU: the same function as on the dequantised base."""

import copy

import pytest

torch = pytest.importorskip("torch")
bnb = pytest.importorskip("bitsandbytes")
peft = pytest.importorskip("peft")

from torch import nn  # noqa: E402

from crab_edge.errors import ModelError  # noqa: E402
from crab_edge.ilora.torch_register import register  # noqa: E402
from crab_edge.ilora.torch_tuner import ILoRAConfig, trace_routes  # noqa: E402
from crab_edge.model.quantised import dequantised, is_quantised, quantise_base  # noqa: E402

register()
torch.set_num_threads(2)
CONFIG = {"r": 4, "lora_alpha": 10, "num_experts": 3, "lora_dropout": 0.0, "init_weights": False}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        # 96 x 80 isn't a whole number of rows of 64: blocks run over the rows' ends.
        self.up_proj, self.down_proj = nn.Linear(80, 96), nn.Linear(96, 64, bias=False)

    def forward(self, x):
        return self.down_proj(torch.tanh(self.up_proj(x)))


def pair(bits, *, dtype=torch.float32, adapter_dtype=torch.float32):
    """The same adapter on a quantised base and on the float base that it stands for."""
    torch.manual_seed(0)
    low = Net().to(dtype)
    high = copy.deepcopy(low)
    names = quantise_base(low, bits, compute_dtype=dtype)
    assert names == ["up_proj", "down_proj"]
    for name in names:
        error = dequantised(getattr(low, name)).to(dtype) - getattr(high, name).weight
        assert 0 < error.abs().mean() < (0.015 if bits == 4 else 0.001)
        getattr(high, name).weight.data.copy_(dequantised(getattr(low, name)))
    models = []
    for net in (low, high):
        torch.manual_seed(1)
        config = ILoRAConfig(**CONFIG, target_modules=["up_proj", "down_proj"])
        model = peft.get_peft_model(net, config)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(adapter_dtype)
        models.append(model)
    return models


@pytest.mark.parametrize(
    "dtype, adapter_dtype, near",
    [
        (torch.float32, torch.float32, 1e-5),
        (torch.bfloat16, torch.float32, 0.02),
        (torch.bfloat16, torch.bfloat16, 0.02),
    ],
)
def test_four_bits_equal_the_dequantised_base_forward_and_backward(dtype, adapter_dtype, near):
    low, high = pair(4, dtype=dtype, adapter_dtype=adapter_dtype)
    x = torch.randn(7, 80, dtype=dtype)
    seen = []
    for model in (low, high):
        given = x.clone().requires_grad_()
        y = model(given)
        assert y.dtype == dtype
        y.float().square().mean().backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        seen.append((y.detach(), given.grad, gradients))
    (y, back, gradients), (y_true, back_true, truth) = seen
    torch.testing.assert_close(y, y_true, atol=near, rtol=near)
    torch.testing.assert_close(back, back_true, atol=near, rtol=near)
    assert gradients.keys() == truth.keys() == {n for n, _ in low.named_parameters() if "lora_" in n}
    for name, gradient in gradients.items():
        # A and R behind the experts, B: each one learns.
        assert gradient.dtype == adapter_dtype and gradient.abs().sum() > 0, name
        torch.testing.assert_close(gradient, truth[name], atol=near, rtol=10 * near)


def test_eight_bits_learn_too_within_the_input_rounding():
    low, high = pair(8)
    x = torch.randn(7, 80)
    y, truth = low(x), high(x)
    # LLM.int8() rounds its input to 8 bits: not equal, but near.
    assert 0 < (y - truth).abs().mean() < 0.02 * truth.abs().mean() + 1e-3
    y.square().mean().backward()
    learnt = {n for n, p in low.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert learnt == {n for n, _ in low.named_parameters() if "lora_" in n}


def test_steps_move_the_adapter_and_leave_the_base():
    low, _ = pair(4)
    before = {n: p.detach().clone() for n, p in low.named_parameters()}
    x, target = torch.randn(32, 80), torch.randn(32, 64)
    optimizer = torch.optim.AdamW([p for p in low.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(30):
        with torch.autocast("cpu", torch.bfloat16):
            loss = (low(x).float() - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    for name, parameter in low.named_parameters():
        assert torch.equal(parameter, before[name]) == ("lora_" not in name), name


def test_merging_is_refused_and_the_routers_can_be_traced():
    low, _ = pair(4)
    with pytest.raises(ModelError, match="can't be merged"):
        low.merge_and_unload()
    with pytest.raises(ModelError, match="can't be merged"):
        low.base_model.model.up_proj.merge()
    with trace_routes(low) as routes:
        low(torch.randn(2, 80))
    assert {n: [tuple(g.shape) for g in calls] for n, calls in routes.items()} == {
        "up_proj": [(2, 3)],
        "down_proj": [(2, 3)],
    }


def test_what_is_saved_over_a_quantised_base_loads_on_a_float_one(tmp_path):
    low, _ = pair(4)
    low.save_pretrained(tmp_path)
    files = {p.name for p in tmp_path.iterdir()}
    assert "adapter_model.safetensors" in files
    torch.manual_seed(0)
    model = peft.PeftModel.from_pretrained(Net(), str(tmp_path))
    ours, theirs = (peft.get_peft_model_state_dict(m) for m in (low, model))
    assert ours.keys() == theirs.keys() and all("lora_" in n for n in ours)
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)


def test_bad_bases_are_refused():
    with pytest.raises(ModelError, match="4 or 8 bits, got 3"):
        quantise_base(Net(), 3)
    with pytest.raises(ModelError, match="no linear"):
        quantise_base(nn.Embedding(2, 2), 4)
    low, high = pair(4)
    with pytest.raises(ModelError, match="carries an adapter already"):
        quantise_base(high, 4)
    with pytest.raises(ModelError, match="quantised already"):
        quantise_base(low.unload(), 4)
    with pytest.raises(ModelError, match="isn't a quantised linear"):
        dequantised(nn.Linear(2, 2))
    with torch.device("meta"):
        empty = Net()
    with pytest.raises(ModelError, match="isn't a float weight in memory"):
        quantise_base(empty, 4)
    assert not is_quantised(nn.Linear(2, 2))
