"""MixLoRA's routers against their definitions, token by token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from method_oracles import softmax
from test_methods import gradients, inputs, made
from torch import Tensor

from more_ds.tuners.mixlora import MixLoraConfig
from more_ds.tuners.mixlora_router import route


def config(**options: Any) -> MixLoraConfig:
    return MixLoraConfig(experts=4, **options)


def tokens() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    h, router = torch.randn(3, 9, 6, generator=generator).double(), torch.randn(4, 6, generator=generator).double()
    real = torch.ones(3, 9, 1)
    real[0, :4] = 0
    return h, router, real


def dense(routes: Any) -> Tensor:
    return torch.zeros_like(routes.p).scatter_add(-1, routes.experts, routes.weights)


def test_dynamic_keeps_the_highest_until_their_sum_is_reached() -> None:
    h, router, real = tokens()
    routes = route(h, router, config(router="dynamic", top_p=0.7), True, real)
    counts = set()
    for i in range(3):
        for t in range(9):
            p = softmax(router @ h[i, t])
            expected, total = torch.zeros(4).double(), 0.0
            for e in sorted(range(4), key=lambda e, p=p: -p[e].item()):
                expected[e] = p[e]
                total += p[e].item()
                if total > 0.7:
                    break
            torch.testing.assert_close(dense(routes)[i, t], expected)
            assert routes.used[i, t].tolist() == (expected > 0).double().tolist()
            counts.add(int((expected > 0).sum()))
    assert len(counts) > 1, "tokens use different numbers of experts"
    one = route(h, router, config(router="dynamic", top_p=1e-9), True, real)
    assert (one.used.sum(-1) == 1).all()
    torch.testing.assert_close(dense(route(h, router, config(router="dynamic", top_p=1.0), True, real)), routes.p)


@pytest.mark.parametrize("training", [True, False])
def test_switch_takes_the_highest_up_to_its_capacity(training: bool) -> None:
    h, router, real = tokens()
    routes = route(h, router, config(router="switch", capacity=2, jitter=0.0), training, real)
    dropped = 0
    for i in range(3):
        taken = [0] * 4
        for t in range(9):
            logits = router @ h[i, t]
            p = softmax(logits)
            best = int(p.argmax())
            taken[best] += int(real[i, t])
            over = training and taken[best] > 2
            dropped += over
            expected = torch.zeros(4).double()
            expected[best] = 0.0 if over else p[best]
            torch.testing.assert_close(dense(routes)[i, t], expected)
            torch.testing.assert_close(routes.z[i, t], torch.log(torch.exp(logits).sum()) ** 2)
            assert routes.used[i, t].argmax() == best
    assert (dropped > 0) == training


def test_jitter_moves_the_routers_input_in_training_alone() -> None:
    h, router, real = tokens()
    options = config(router="switch", jitter=0.3)
    still = route(h, router, options, False, real).p
    torch.manual_seed(0)
    assert (route(h, router, options, True, real).p - still).abs().max() > 0.01
    assert torch.equal(route(h, router, config(router="switch", jitter=0.0), True, real).p, still)


@pytest.mark.parametrize("router", ["dynamic", "switch"])
@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_they_train_in_a_model(router: str, kind: str) -> None:
    model = made("mixlora", kind, router=router)
    found = gradients(model, inputs("mixlora", kind))
    assert found.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(g.abs().sum() > 0 for name, g in found.items() if name.endswith("router"))


def test_the_switchs_loss_is_balance_and_z() -> None:
    model = made("mixlora", router="switch", balance=0.25, z_loss=0.5, jitter=0.0).double()
    model.train()(**inputs("mixlora"))
    both = model.losses["balance"]
    parts = []
    for options in ({"balance": 0.0}, {"z_loss": 0.0}):
        other = made("mixlora", router="switch", **{"balance": 0.25, "z_loss": 0.5, "jitter": 0.0, **options}).double()
        other.train()(**inputs("mixlora"))
        parts.append(other.losses["balance"])
    torch.testing.assert_close(both, parts[0] + parts[1])
    assert all(part > 0 for part in parts)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"router": "top_p"}, "use one of"), ({"top_p": 0}, "above 0"), ({"capacity": 0}, "at least 1")],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MixLoraConfig(**options)
