"""Mixture of experts from the outside: the experts are a loop, the router is what it says, and the bias balances it.

The full comparison of the kernel is in tests/kernels/test_moe.py.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nsa_transformer import ModelConfig, MoEConfig, NSAConfig, Transformer
from nsa_transformer.distributed.world import World
from nsa_transformer.kernels import experts
from nsa_transformer.memory.activation_checkpointing import apply_activation_checkpointing
from nsa_transformer.models.moe import MixtureOfExperts, Router, global_balance_loss, load_statistics
from nsa_transformer.training.balance import StepLoad

CONFIG = MoEConfig(num_experts=8, top_k=2, expert_size=16, num_shared_experts=1, bias_update_rate=0.01, sequence_loss_weight=0.0)


def layer(config: MoEConfig = CONFIG, hidden: int = 12) -> MixtureOfExperts:
    torch.manual_seed(0)
    return MixtureOfExperts(hidden, config)


def run(mixture: MixtureOfExperts, x: Tensor, valid: Tensor | None = None):
    """As one document."""
    return mixture(x, torch.zeros(len(x), dtype=torch.int64), 1, valid)


# ------------------------------------------------------------------------------------------------------------- the experts


@pytest.mark.parametrize("top_k", [1, 3])
def test_experts_are_a_loop_over_tokens(top_k: int):
    torch.manual_seed(0)
    x, grad = torch.randn(2, 20, 6, dtype=torch.float64)
    w13, w2 = torch.randn(5, 8, 6, dtype=torch.float64), torch.randn(5, 6, 4, dtype=torch.float64)
    weights, indices = torch.rand(20, top_k, dtype=torch.float64), torch.rand(20, 5).topk(top_k).indices
    leaves = [tensor.requires_grad_() for tensor in (x, weights, w13, w2)]
    rows = []
    for t in range(20):
        row = torch.zeros(6, dtype=torch.float64)
        for k, e in enumerate(indices[t].tolist()):
            row = row + weights[t, k] * (w2[e] @ (F.silu(w13[e, :4] @ x[t]) * (w13[e, 4:] @ x[t])))
        rows.append(row)
    expected = torch.stack(rows)
    found = experts(x, indices, weights, w13, w2)
    torch.testing.assert_close(found, expected)
    for a, b in zip(torch.autograd.grad(found, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True):
        torch.testing.assert_close(a, b)


def test_a_layer_is_its_routed_experts_and_the_shared_one():
    mixture, x = layer(), torch.randn(30, 12)
    y, _ = run(mixture, x)
    scores = (x @ mixture.router.weight.T).sigmoid()
    expected = mixture.shared(x)
    for t in range(30):
        chosen = scores[t].topk(2).indices
        for e in chosen.tolist():
            gate, up = (mixture.w13[e] @ x[t]).chunk(2)
            expected[t] = expected[t] + scores[t, e] / scores[t, chosen].sum() * (mixture.w2[e] @ (F.silu(gate) * up))
    torch.testing.assert_close(y, expected)
    alone = layer(MoEConfig(num_experts=8, top_k=2, expert_size=16, num_shared_experts=0))
    assert alone.shared is None and run(alone, x)[0].shape == x.shape


# -------------------------------------------------------------------------------------------------------------- the router


def test_weights_are_renormalised_scores_and_the_bias_only_chooses():
    router, x = Router(12, MoEConfig(num_experts=8, top_k=3, routed_scaling=2.5)), torch.randn(40, 12)
    with torch.no_grad():
        router.bias[5] = 10.0
    indices, weights, logits = router(x)
    torch.testing.assert_close(logits, x @ router.weight.T)
    assert (indices == 5).any(-1).all(), "the biased expert is chosen by all"
    scores = logits.sigmoid().gather(-1, indices)
    torch.testing.assert_close(weights, 2.5 * scores / scores.sum(-1, keepdim=True))
    torch.testing.assert_close(weights.sum(-1), torch.full((40,), 2.5))
    assert indices.dtype == torch.int64 and weights.dtype == torch.float32


def test_softmax_scores():
    router, x = Router(12, MoEConfig(num_experts=8, top_k=3, score="softmax", sequence_loss_weight=0.1)), torch.randn(40, 12)
    indices, weights, logits = router(x)
    scores = logits.softmax(-1)
    assert torch.equal(indices, scores.topk(3).indices)
    chosen = scores.gather(-1, indices)
    torch.testing.assert_close(weights, chosen / chosen.sum(-1, keepdim=True))
    # tokens * sum_i f_i P_i of one document, with the shares as they are: they sum to 1 already.
    visits = torch.zeros(8).index_add_(0, indices.flatten(), torch.ones(120))
    expected = 0.1 * 8 / (3 * 40) * (visits * scores.sum(0)).sum()
    torch.testing.assert_close(router.statistics(logits, indices, torch.zeros(40, dtype=torch.int64), 1, None).auxiliary, expected)


def test_a_token_visits_its_best_groups_alone():
    torch.manual_seed(0)
    router, x = Router(12, MoEConfig(num_experts=12, top_k=4, num_groups=4, top_groups=2)), torch.randn(200, 12)
    with torch.no_grad():
        router.weight.normal_(std=0.5)
        router.bias.normal_(std=0.1)
    indices, weights, logits = router(x)
    biased = (logits.sigmoid() + router.bias).detach()
    free = biased.topk(4).indices
    differs = 0
    for t in range(200):
        best = sorted(range(4), key=lambda g, t=t: -float(biased[t, 3 * g : 3 * g + 3].topk(2).values.sum()))[:2]
        allowed = [e for g in best for e in range(3 * g, 3 * g + 3)]
        expected = sorted(allowed, key=lambda e, t=t: -float(biased[t, e]))[:4]
        assert indices[t].tolist() == expected
        differs += sorted(expected) != sorted(free[t].tolist())
    assert differs > 20, "groups must change something here"
    torch.testing.assert_close(weights.sum(-1), torch.ones(200))
    alone = Router(12, MoEConfig(num_experts=4, top_k=2, num_groups=4, top_groups=2))  # groups of one expert
    assert alone(x)[0].shape == (200, 2)


def test_forced_balance_lets_experts_take_turns():
    router, x = Router(12, MoEConfig(num_experts=8, top_k=3, forced_balance=True)), torch.randn(40, 12)
    indices, weights, logits = router(x)
    assert torch.equal(indices.flatten(), torch.arange(120) % 8) and all(len(set(row)) == 3 for row in indices.tolist())
    scores = logits.sigmoid().gather(-1, indices)
    torch.testing.assert_close(weights, scores / scores.sum(-1, keepdim=True))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_groups": 3}, "num_groups=3 does not divide num_experts=8"),
        ({"num_groups": 4, "top_groups": 5}, "top_groups=5 is more than num_groups=4"),
        ({"num_groups": 4, "top_k": 3}, "top_k=3 is more than the 2 experts of top_groups=1"),
        ({"num_groups": 0}, "num_groups=0 must be greater than 0"),
    ],
    ids=str,
)
def test_groups_that_cannot_be(changes: dict[str, int], words: str):
    with pytest.raises(ValueError, match=words):
        MoEConfig(**{"num_experts": 8, "top_k": 2} | changes)


def test_statistics_of_a_load():
    even, one, dead = [5, 5, 5, 5], [20, 0, 0, 0], [10, 10, 0, 0]
    found = load_statistics(torch.tensor([even, dead]))
    assert found == {
        "expert_load_max_over_mean": 2.0,
        "expert_load_entropy": pytest.approx(0.5),
        "dead_experts": 2,
        "expert_balance": {"max_over_mean": [1.0, 2.0], "entropy": [1.0, 0.5], "dead": [0, 2]},
        "expert_load": [[0.25] * 4, [0.5, 0.5, 0.0, 0.0]],
    }
    assert load_statistics(torch.tensor([[1, 2]]))["expert_load"] == [[0.33333, 0.66667]]
    assert load_statistics(torch.tensor([one, even]))["expert_load_entropy"] == 0.0
    assert load_statistics(torch.zeros(1, 4, dtype=torch.int64))["dead_experts"] == 4


def test_the_router_computes_in_float32_under_autocast():
    router, x = Router(64, CONFIG), torch.randn(50, 64)
    outside = router(x)
    with torch.autocast("cpu", torch.bfloat16):
        inside = router(x)
        half = router(x.bfloat16())
    for a, b in zip(outside, inside, strict=True):
        assert torch.equal(a, b) and a.dtype == b.dtype
    assert half[2].dtype == torch.float32
    assert torch.equal(half[2], F.linear(x.bfloat16().float(), router.weight))


def test_the_bias_update():
    router = Router(4, MoEConfig(num_experts=4, top_k=1, bias_update_rate=0.1))
    router.update_bias(torch.tensor([70, 10, 10, 10]))
    torch.testing.assert_close(router.bias, torch.tensor([-0.15, 0.05, 0.05, 0.05]))
    router.update_bias(torch.tensor([25, 25, 25, 25]))
    torch.testing.assert_close(router.bias, torch.tensor([-0.15, 0.05, 0.05, 0.05]), msg="a balanced step changes nothing")
    for load in torch.randint(0, 100, (50, 4)):
        router.update_bias(load)
        assert abs(float(router.bias.mean())) < 1e-6
    assert router.bias.dtype == torch.float32 and not router.bias.requires_grad and "bias" in router.state_dict()


def test_the_bias_balances_a_router_that_starts_out_imbalanced(capsys: pytest.CaptureFixture[str]):
    """Half of the experts start 0.8 ahead in their logits, through a direction that all tokens share. Trained with and without the bias."""

    def imbalance(rate: float) -> tuple[float, float]:
        generator = torch.Generator().manual_seed(1)
        mixture = layer(MoEConfig(num_experts=8, top_k=2, expert_size=16, bias_update_rate=rate, sequence_loss_weight=0.0), hidden=16)
        with torch.no_grad():
            mixture.router.weight.normal_(std=0.2, generator=generator)
            mixture.router.weight[:, 0] = torch.tensor([0.8] * 4 + [0.0] * 4)
        teacher = torch.randn(16, 16, generator=generator) / 4
        optimizer = torch.optim.Adam(mixture.parameters(), lr=1e-3)
        history = []
        for _ in range(200):
            x = torch.randn(256, 16, generator=generator)
            x[:, 0] = 1.0
            y, statistics = run(mixture, x)
            F.mse_loss(y, x @ teacher).backward()
            optimizer.step()
            optimizer.zero_grad()
            mixture.router.update_bias(statistics.load)
            history.append(statistics.load)
        first, last = history[0].double(), torch.stack(history[-10:]).double().sum(0)
        return float(first.max() / first.mean()), float(last.max() / last.mean())

    before, after = imbalance(rate=0.01)
    _, without = imbalance(rate=0.0)
    with capsys.disabled():
        print(f"\nexpert load, max / mean: {before:.2f} at the start; after 200 steps {after:.2f} with the bias, {without:.2f} without ", end="")
    assert before > 1.7 and without > 1.5, "the start must be imbalanced, and stay so by itself"
    assert after < 1.15


@pytest.mark.parametrize(("bias", "weight", "bound"), [(0.02, 0.0, 1.8), (0.0, 0.1, 2.5), (0.0, 0.0, None)], ids=["bias", "global loss", "neither"])
def test_a_collapsed_router_recovers(bias: float, weight: float, bound: float | None):
    """Every token goes to expert 0, whose logit is 4 ahead through a direction that all tokens share. The bias alone undoes that, and so does the global loss
    alone, though slowly: its gradient is small where a score is near 1."""
    generator = torch.Generator().manual_seed(1)
    config = MoEConfig(num_experts=8, top_k=1, expert_size=16, bias_update_rate=bias, sequence_loss_weight=0.0, global_loss_weight=weight)
    mixture = layer(config, hidden=16)
    with torch.no_grad():
        mixture.router.weight.normal_(std=0.2, generator=generator)
        mixture.router.weight[:, 0] = torch.tensor([4.0] + [0.0] * 7)
    optimizer = torch.optim.Adam(mixture.parameters(), lr=3e-2)
    worst = []
    for _ in range(400):
        x = torch.randn(256, 16, generator=generator)
        x[:, 0] = 1.0
        y, statistics = run(mixture, x)
        loss = F.mse_loss(y, x.flip(1))
        if statistics.share is not None:
            loss = loss + global_balance_loss(statistics.share[None], statistics.load[None], weight) / len(x)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mixture.router.update_bias(statistics.load)
        worst.append(load_statistics(statistics.load[None])["expert_load_max_over_mean"])
    assert worst[0] == 8.0, "it must have collapsed"
    if bound is not None:
        assert max(worst[-10:]) < bound, worst[::10]
    else:
        assert min(worst) > 6.0, "it must not recover by itself"


# ---------------------------------------------------------------------------------------------------------- the statistics


def test_padding_is_routed_but_not_counted():
    mixture, x = layer(), torch.randn(40, 12)
    valid = torch.arange(40) < 25
    y, statistics = run(mixture, x, valid)
    _, real = run(mixture, x[:25])
    assert torch.equal(statistics.load, real.load) and int(statistics.load.sum()) == 25 * 2
    assert statistics.load.dtype == torch.int64
    torch.testing.assert_close(y, run(mixture, x)[0])


def hand_made(config: MoEConfig) -> tuple[Router, Tensor, Tensor]:
    """Three tokens, two experts, top 1. Sigmoids 3/4 and 1/4, 1/2 and 1/4, 1/5 and 3/5."""
    logits = torch.tensor([[3.0, 1 / 3], [1.0, 1 / 3], [0.25, 1.5]]).log()
    return Router(1, config), logits, torch.tensor([[0], [0], [1]])


def test_sequence_loss_by_hand():
    """Shares 3/4 1/4, 2/3 1/3, 1/4 3/4. Tokens 0 and 1 are one document, token 2 another, token 3 would be padding."""
    router, logits, indices = hand_made(MoEConfig(num_experts=2, top_k=1, sequence_loss_weight=0.5))
    document = torch.tensor([0, 0, 1])
    # Document 0: f = [2, 0], P = [17/24, 7/24], 2 tokens; document 1: f = [0, 2], P = [1/4, 3/4], 1 token.
    expected = 0.5 * (2 * 2 * 17 / 24 + 1 * 2 * 3 / 4)
    assert float(router.statistics(logits, indices, document, 2, None).auxiliary) == pytest.approx(expected, rel=1e-6)
    # All in one document: f = [4/3, 2/3], P = [5/9, 4/9], 3 tokens.
    together = router.statistics(logits, indices, torch.zeros(3, dtype=torch.int64), 1, None).auxiliary
    assert float(together) == pytest.approx(0.5 * 3 * (4 / 3 * 5 / 9 + 2 / 3 * 4 / 9), rel=1e-6)
    padded = router.statistics(
        torch.cat([logits, torch.tensor([[5.0, -5.0]])]), torch.tensor([[0], [0], [1], [0]]), torch.tensor([0, 0, 1, 2]), 4, torch.tensor([True] * 3 + [False])
    )
    assert float(padded.auxiliary) == pytest.approx(expected, rel=1e-6), "padding and empty documents add nothing"
    with torch.no_grad():
        assert float(router.statistics(logits, indices, document, 2, None).auxiliary) == 0.0, "not computed where nobody differentiates"


def test_sequence_loss_pulls_towards_balance():
    """One step against its gradient lowers the score of the expert with more visits, relative to the other."""
    router, logits, indices = hand_made(MoEConfig(num_experts=2, top_k=1, sequence_loss_weight=1.0))
    logits.requires_grad_()
    router.statistics(logits, indices, torch.zeros(3, dtype=torch.int64), 1, None).auxiliary.backward()
    assert (logits.grad[:, 0] > 0).all() and (logits.grad[:, 1] < 0).all()


def test_global_loss_by_hand():
    """The shares are those of the sequence loss; the frequencies come from elsewhere as well."""
    router, logits, indices = hand_made(MoEConfig(num_experts=2, top_k=1, sequence_loss_weight=0.0, global_loss_weight=0.5))
    document, valid = torch.zeros(3, dtype=torch.int64), torch.tensor([True, False, True])
    share = router.statistics(logits, indices, document, 1, valid).share
    torch.testing.assert_close(share, torch.tensor([1.0, 1.0]))  # 3/4 + 1/4 and 1/4 + 3/4
    assert float(global_balance_loss(torch.tensor([[1.5, 0.5]]), torch.tensor([[30, 10]]), 0.5)) == pytest.approx(0.5 * 2 * (0.75 * 1.5 + 0.25 * 0.5))
    assert float(global_balance_loss(torch.tensor([[1.5, 0.5]]), torch.tensor([[0, 0]]), 0.5)) == 0.0
    with torch.no_grad():
        assert router.statistics(logits, indices, document, 1, valid).share is None
    assert hand_made(CONFIG)[0].statistics(logits, indices, document, 1, None).share is None, "not computed where nothing asks for it"


def test_z_loss_by_hand():
    router, logits, indices = hand_made(MoEConfig(num_experts=2, top_k=1, sequence_loss_weight=0.0, z_loss_weight=0.1))
    document = torch.zeros(3, dtype=torch.int64)
    terms = [math.log(3 + 1 / 3) ** 2, math.log(1 + 1 / 3) ** 2, math.log(0.25 + 1.5) ** 2]
    assert float(router.statistics(logits, indices, document, 1, None).auxiliary) == pytest.approx(0.1 * sum(terms), rel=1e-5)
    masked = router.statistics(logits, indices, document, 1, torch.tensor([True, False, True])).auxiliary
    assert float(masked) == pytest.approx(0.1 * (terms[0] + terms[2]), rel=1e-5)


# ---------------------------------------------------------------------------------------------------- in the transformer


def tiny(**moe) -> Transformer:
    nsa = NSAConfig(compress_block=4, compress_stride=2, select_block=8, num_selected=4, window=8)
    fields = {"num_experts": 6, "top_k": 2, "expert_size": 8, "sequence_loss_weight": 0.01, "z_loss_weight": 0.01, **moe}
    model = Transformer(
        ModelConfig(
            vocab_size=50,
            hidden_size=16,
            num_layers=3,
            num_heads=2,
            num_kv_heads=1,
            head_dim=8,
            intermediate_size=24,
            nsa=nsa,
            moe=MoEConfig(**fields),
            init_std=0.2,
        )
    )
    model.init_weights(3)
    return model


def packs(count: int, length: int = 40) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Tokens, cu_seqlens, targets, valid: two documents and some padding each."""
    generator = torch.Generator().manual_seed(0)
    result = []
    for number in range(count):
        tokens = torch.randint(0, 50, (length,), generator=generator)
        valid = torch.arange(length) < length - 3 - number
        cu_seqlens = torch.tensor([0, 15, length - 3 - number, length], dtype=torch.int32)
        result.append((tokens, cu_seqlens, tokens.roll(-1).where(valid, -100), valid))
    return result


def test_layers_with_experts_and_without():
    model = tiny(num_dense_layers=2)
    assert [isinstance(block.mlp, MixtureOfExperts) for block in model.layers] == [False, False, True]
    tokens, cu_seqlens, targets, valid = packs(1)[0]
    out = model(tokens, cu_seqlens, targets=targets, valid=valid)
    assert out.load.shape == (1, 6) and int(out.load.sum()) == 2 * int(valid.sum())
    dense = tiny(num_experts=0)
    out = dense(tokens, cu_seqlens, targets=targets, valid=valid)
    assert out.load.shape == (0, 0) and float(out.auxiliary) == 0.0


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_load_and_losses_do_not_change_with_activation_checkpointing(mode: str):
    """Recomputing a block must not count its tokens twice."""
    results = []
    for chosen in ("none", mode):
        model = tiny()
        apply_activation_checkpointing(model, chosen)
        tokens, cu_seqlens, targets, valid = packs(1)[0]
        out = model(tokens, cu_seqlens, targets=targets, valid=valid)
        (out.loss + out.auxiliary).backward()
        results.append(out)
    assert torch.equal(results[0].load, results[1].load) and int(results[1].load.sum()) == 2 * 2 * 37
    assert torch.equal(results[0].auxiliary, results[1].auxiliary) and results[1].auxiliary.item() > 0


@pytest.mark.parametrize("mode", ["none", "full"])
def test_the_global_loss_of_each_pass_is_the_formula(mode: str):
    """Value and gradient of three passes with padding, in float64 from the logits: f of the passes so far, P of the pass."""
    model = tiny(num_dense_layers=2, global_loss_weight=0.3, sequence_loss_weight=0.0, z_loss_weight=0.0)
    apply_activation_checkpointing(model, mode)
    seen: list[tuple[Tensor, Tensor]] = []

    def record(_module: Router, _inputs: object, output: tuple[Tensor, Tensor, Tensor]) -> None:
        output[2].retain_grad()
        seen.append((output[0], output[2]))

    model.layers[2].mlp.router.register_forward_hook(record)
    step, visits = StepLoad(0.3, World(0, 1, torch.device("cpu"), None)), torch.zeros(6, dtype=torch.float64)
    for tokens, cu_seqlens, targets, valid in packs(3):
        out = model(tokens, cu_seqlens, targets=targets, valid=valid)
        found = step.add(out) - out.loss
        indices, logits = seen[-1]
        exact = logits.detach().double().requires_grad_()
        visits += torch.bincount(indices[valid].flatten(), minlength=6)
        shares = (exact.sigmoid() / exact.sigmoid().sum(-1, keepdim=True))[valid].sum(0)
        expected = 0.3 * 6 * (visits / visits.sum() * shares).sum()
        assert found.item() == pytest.approx(expected.item(), rel=1e-5)
        found.backward()
        expected.backward()
        torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=1e-5, atol=1e-8)
    assert torch.equal(step.total()[0], visits.long()) and len(seen) == (6 if mode == "full" else 3)


def test_accumulation_equals_one_large_pack():
    """Four packs one after the other, summed, or merged into one: the same loads, router losses and gradients."""
    parts = packs(4)
    model = tiny()
    load, auxiliary = torch.zeros(2, 6, dtype=torch.int64), 0.0
    for tokens, cu_seqlens, targets, valid in parts:
        out = model(tokens, cu_seqlens, targets=targets, valid=valid)
        (out.loss + out.auxiliary).backward()
        load += out.load
        auxiliary += out.auxiliary.item()
    accumulated = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    tokens, targets, valid = (torch.cat([part[place] for part in parts]) for place in (0, 2, 3))
    merged = torch.cat([parts[0][1][:1], *(part[1][1:] + 40 * number for number, part in enumerate(parts))])
    out = model(tokens, merged, targets=targets, valid=valid)
    (out.loss + out.auxiliary).backward()
    assert torch.equal(out.load, load)
    assert out.auxiliary.item() == pytest.approx(auxiliary, rel=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, accumulated[name], rtol=2e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_update_router_bias_reaches_each_layer():
    model = tiny(bias_update_rate=0.5)
    model.update_router_bias(torch.tensor([[9, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 9]]))
    assert [int(block.mlp.router.bias.argmin()) for block in list(model.layers)[1:]] == [0, 5]
    with pytest.raises(ValueError):
        model.update_router_bias(torch.zeros(3, 6))


def test_padding_takes_no_part_in_any_gradient():
    tokens, cu_seqlens, targets, valid = packs(1)[0]
    grads = []
    for length in (40, 37):
        model = tiny()
        out = model(tokens[:length], cu_seqlens[: 4 if length == 40 else 3], targets=targets[:length], valid=valid[:length])
        (out.loss + out.auxiliary).backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
