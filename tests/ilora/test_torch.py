"""The torch layer and its PEFT tuner."""

import copy
import subprocess
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from torch import nn  # noqa: E402

from crab_edge.errors import ModelError  # noqa: E402
from crab_edge.ilora import reference  # noqa: E402
from crab_edge.ilora.torch_layer import ILoRALinear  # noqa: E402
from crab_edge.ilora.torch_register import register  # noqa: E402
from crab_edge.ilora.torch_tuner import ILoRAConfig, trace_routes  # noqa: E402

torch.set_num_threads(2)
SIZES = {"r": 4, "lora_alpha": 10, "num_experts": 3, "lora_dropout": 0.5}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(12, 20), nn.Linear(20, 6, bias=False)

    def forward(self, x):
        return self.down_proj(torch.tanh(self.up_proj(x)))


def net(seed=0, **changes):
    torch.manual_seed(seed)
    config = ILoRAConfig(
        **{**SIZES, "target_modules": ["up_proj", "down_proj"], "init_weights": False, **changes}
    )
    return peft.get_peft_model(Net(), config)


def layer(dtype=torch.float32, **changes):
    torch.manual_seed(0)
    return ILoRALinear(
        nn.Linear(12, 7).to(dtype), "default", **{**SIZES, "init_weights": False, **changes}
    ).eval()


def official(module, x):
    """The reference's loop, in the layer's dtype."""
    y = module.base_layer(x)
    g = torch.softmax(module.lora_route["default"](x), dim=-1, dtype=torch.float32).to(y.dtype)
    h = module.lora_A["default"](x)
    for i, b in enumerate(module.experts("default")):
        y = y + (g[..., i : i + 1] * b(h)) * module.scaling("default")
    return y


def array(tensor):
    return tensor.detach().double().numpy()


@pytest.mark.parametrize("experts", [1, 3, 4])
def test_equal_to_the_reference_and_to_the_official_loop(experts):
    module = layer(num_experts=experts)
    x = torch.randn(2, 5, 12)
    truth = reference.ilora_linear(
        array(x),
        array(module.base_layer.weight),
        array(module.base_layer.bias),
        array(module.lora_A["default"].weight),
        array(module.lora_route["default"].weight),
        [array(b.weight) for b in module.experts("default")],
        2.5,
    )
    np.testing.assert_allclose(array(module(x)), truth, atol=1e-5)
    torch.testing.assert_close(module(x), official(module, x))


def test_identity_at_first_and_init():
    module = layer(init_weights=True)
    x = torch.randn(3, 12)
    assert torch.equal(module(x), module.base_layer(x))
    assert all(not b.weight.any() for b in module.experts("default"))
    bound = 12**-0.5
    for linear in (module.lora_A["default"], module.lora_route["default"]):
        assert 0.5 * bound < linear.weight.abs().max() <= bound


def test_dropout_touches_the_input_of_A_only():
    module = layer().train()
    x = torch.randn(40, 12)
    routes, downs = [], []
    module.on_route = routes.append
    module.lora_A["default"].register_forward_pre_hook(lambda _, args: downs.append(args[0]))
    module(x)
    module.eval()
    module(x)
    assert torch.equal(routes[0], routes[1])
    zeroed = downs[0] == 0
    assert 0.3 < zeroed.float().mean() < 0.7
    torch.testing.assert_close(downs[0][~zeroed], 2 * x[~zeroed])
    assert torch.equal(downs[1], x)


def test_the_routers_softmax_is_fp32_and_the_dtype_follows_the_base():
    module = layer(dtype=torch.bfloat16)
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
    routes = []
    module.on_route = routes.append
    x = torch.randn(5, 12, dtype=torch.bfloat16)
    assert module(x).dtype == torch.bfloat16
    assert routes[0].dtype == torch.float32
    torch.testing.assert_close(routes[0].sum(-1), torch.ones(5), atol=1e-6, rtol=0)
    torch.testing.assert_close(module(x), official(module, x), atol=0.05, rtol=0.05)


def test_gradients_reach_the_adapter_and_nothing_else():
    model = net()
    model(torch.randn(8, 12)).square().mean().backward()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
        else:
            assert not parameter.requires_grad and parameter.grad is None, name


def test_gradients_are_those_of_the_official_loop():
    ours = layer()
    theirs = copy.deepcopy(ours)
    x = torch.randn(6, 12)
    ours(x).square().sum().backward()
    official(theirs, x).square().sum().backward()
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)


def test_it_trains_under_autocast():
    model = net(init_weights=True, lora_dropout=0.1, lora_alpha=8).train()
    torch.manual_seed(1)
    x = torch.randn(128, 12)
    teacher = x.clamp(min=0) @ torch.randn(12, 6) * 0.3
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(60):
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
        assert y.dtype == torch.bfloat16
        loss = (y.float() - teacher).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_new_adapter_keeps_the_models_mode():
    config = ILoRAConfig(**SIZES, target_modules=["up_proj"])
    for training in (True, False):
        model = peft.get_peft_model(Net().train(training), config)
        model.add_adapter("other", copy.copy(config))
        adapted = model.base_model.model.up_proj
        assert {m.training for m in (adapted, *adapted.lora_dropout.values())} == {training}


def test_adapters_can_be_disabled_switched_and_deleted():
    model = net().eval()
    x = torch.randn(4, 12)
    first = model(x)
    with model.disable_adapter():
        base = model(x)
    assert not torch.equal(first, base) and torch.equal(model(x), first)

    other = ILoRAConfig(r=2, lora_alpha=2, num_experts=5, target_modules=["up_proj"], init_weights=False)
    model.add_adapter("other", other)
    assert torch.equal(model(x), first)
    model.set_adapter("other")
    second = model(x)
    assert not torch.equal(second, first) and not torch.equal(second, base)
    trained = {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {"other"}
    model.set_adapter("default")
    assert torch.equal(model(x), first)
    model.delete_adapter("other")
    assert torch.equal(model(x), first)
    assert torch.equal(model.unload()(x), base)


def test_merging_is_refused():
    model = net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ModelError, match="router"):
        model.merge_and_unload()
    with pytest.raises(ModelError, match="router"):
        model.merge_adapter()
    with pytest.raises(ModelError, match="router"):
        model.base_model.model.up_proj.merge()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_only_linears_are_adapted():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(4, 12), Net())
    with pytest.raises(ModelError, match="Embedding"):
        peft.get_peft_model(model, ILoRAConfig(target_modules=["0"]))


def test_registering_again_changes_nothing():
    members = list(peft.PeftType)
    register()
    assert list(peft.PeftType) == members
    assert peft.PeftType("ILORA") is peft.PeftType.ILORA and peft.PeftType.ILORA == "ILORA"
    assert copy.deepcopy(peft.PeftType.ILORA) is peft.PeftType.ILORA


def test_trace_without_an_adapter_is_empty():
    with trace_routes(Net()) as routes:
        pass
    assert routes == {}


FRESH = """
import sys, torch
from torch import nn
import crab_edge.model
from peft import PeftConfig, PeftModel
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(12, 20), nn.Linear(20, 6, bias=False)
    def forward(self, x):
        return self.down_proj(torch.tanh(self.up_proj(x)))
base = Net()
base.load_state_dict(torch.load(sys.argv[1] + "/base.pt"))
assert PeftConfig.from_pretrained(sys.argv[1] + "/adapter").num_experts == 3
model = PeftModel.from_pretrained(base, sys.argv[1] + "/adapter")
x, y = torch.load(sys.argv[1] + "/case.pt")
assert torch.equal(model(x), y), (model(x) - y).abs().max()
"""


def test_a_fresh_process_loads_what_was_saved(tmp_path):
    model = net().eval()
    x = torch.randn(3, 12)
    torch.save((x, model(x).detach()), tmp_path / "case.pt")
    model.save_pretrained(tmp_path / "adapter")
    torch.save(model.unload().state_dict(), tmp_path / "base.pt")
    done = subprocess.run([sys.executable, "-c", FRESH, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
