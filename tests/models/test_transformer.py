"""The transformer: packing, causality, norm, loss, initial weights, sizes, bad input."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nsa_transformer import ModelConfig, Transformer
from nsa_transformer.config import build_config
from nsa_transformer.models.loss import summed_loss, token_losses
from nsa_transformer.models.transformer import LossOutput, RMSNorm, count_parameters

from .small import VOCABULARY, random_tokens, small_config, small_model

ATTENTIONS = ["nsa", "dense", "window"]
LENGTHS = [17, 0, 1, 40, 3, 29]
CU_SEQLENS = torch.tensor([0, 17, 17, 18, 58, 61, 90], dtype=torch.int32)


# ----------------------------------------------------------------------------------------------------- packs and causality


@torch.no_grad()
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_document_gets_in_a_pack_what_it_gets_alone(attention: str):
    model, tokens = small_model(attention=attention), random_tokens(90)
    packed = model(tokens, CU_SEQLENS)
    alone = torch.cat([model(part) for part in tokens.split(LENGTHS)])
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-4)
    padded = model(tokens, torch.cat([CU_SEQLENS, CU_SEQLENS[-1:].expand(4)]))
    assert torch.equal(packed, padded), "repeating the end changes nothing"
    assert not torch.allclose(packed, model(tokens), rtol=1e-2, atol=1e-2), "boundaries matter"


@torch.no_grad()
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_later_token_changes_nothing_before_it(attention: str):
    model, tokens = small_model(attention=attention), random_tokens(90)
    before = model(tokens, CU_SEQLENS)
    for place in (0, 5, 17, 30, 57, 60, 89):
        changed = tokens.clone()
        changed[place] = (tokens[place] + 1) % VOCABULARY
        after = model(changed, CU_SEQLENS)
        document = int(torch.searchsorted(CU_SEQLENS[1:], place, right=True))
        affected = torch.zeros(90, dtype=torch.bool)
        affected[place : CU_SEQLENS[document + 1]] = True
        torch.testing.assert_close(after[~affected], before[~affected], rtol=1e-5, atol=1e-5)
        assert (after[place] - before[place]).abs().max() > 1e-3


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_gradients_of_a_pack_are_the_sum_over_its_documents(attention: str):
    tokens, targets = random_tokens(90), random_tokens(90, 1)
    model = small_model(attention=attention)

    def gradients(*packs: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]) -> dict[str, torch.Tensor]:
        model.zero_grad()
        for part, target, cu_seqlens in packs:
            out = model(part, cu_seqlens, targets=target)
            (out.loss + out.auxiliary).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    packed = gradients((tokens, targets, CU_SEQLENS))
    alone = gradients(*((a, b, None) for a, b in zip(tokens.split(LENGTHS), targets.split(LENGTHS), strict=True) if len(a)))
    for name, grad in packed.items():
        assert (grad - alone[name]).norm() <= 1e-3 * alone[name].norm() + 1e-4, name


@torch.no_grad()
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_no_token_and_one_token(attention: str):
    model = small_model(attention=attention)
    nothing = torch.zeros(0, dtype=torch.int64)
    assert model(nothing).shape == (0, VOCABULARY)
    assert model(nothing, torch.tensor([0], dtype=torch.int32)).shape == (0, VOCABULARY)
    assert model(nothing, torch.tensor([0, 0], dtype=torch.int32), targets=nothing).loss == 0
    assert model(random_tokens(1)).isfinite().all()


# --------------------------------------------------------------------------------------------------------------- the norm


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("weight", [torch.bfloat16, torch.float16, torch.float32], ids=lambda dtype: f"weight {dtype}")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_norm_is_computed_in_float32_and_rounded_once(dtype: torch.dtype, weight: torch.dtype, device: str):
    generator = torch.Generator().manual_seed(0)
    norm = RMSNorm(96, 1e-6).to(device, weight)
    with torch.no_grad():
        norm.weight.copy_(1 + 0.3 * torch.randn(96, generator=generator))
    for scale in (1e-3, 1.0, 30.0):
        x = (scale * torch.randn(500, 96, generator=generator)).to(device, dtype)
        exact = x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-6).rsqrt() * norm.weight.double()
        for enabled in (False, True):
            with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=enabled):
                y = norm(x)
            assert y.dtype == dtype
            allowed = torch.finfo(dtype).eps / 2 + 8 * torch.finfo(torch.float32).eps
            assert ((y.double() - exact).abs() <= allowed * exact.abs() + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_norm_of_a_16_bit_model_has_the_bits_of_casts_on_the_cpu(dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(50, 96, generator=generator).to(dtype) for _ in range(2))
    norm, leaf = RMSNorm(96, 1e-6).to(dtype), x.requires_grad_()
    casts = F.rms_norm(leaf.float(), (96,), norm.weight.float(), 1e-6).to(dtype)
    y = norm(leaf)
    for found, wanted in zip(
        (y, *torch.autograd.grad(y, (leaf, norm.weight), grad)), (casts, *torch.autograd.grad(casts, (leaf, norm.weight), grad)), strict=True
    ):
        assert torch.equal(found, wanted)


# --------------------------------------------------------------------------------------------------------------- the loss


@pytest.mark.parametrize("chunk_size", [1, 7, 32, 50, 1000])
def test_chunked_loss_is_cross_entropy(chunk_size: int):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(50, 16, generator=generator), torch.randn(40, 16, generator=generator)
    targets = torch.randint(0, 40, (50,), generator=generator)
    targets[::4] = -100
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    plain = F.cross_entropy(hidden @ weight.T, targets, reduction="none")
    torch.testing.assert_close(token_losses(hidden, weight, targets, chunk_size), plain, rtol=1e-5, atol=1e-5)
    loss = summed_loss(hidden, weight, targets, chunk_size)
    torch.testing.assert_close(loss, plain.sum())
    for found, expected in zip(torch.autograd.grad(loss * 0.37, leaves), torch.autograd.grad(plain.sum() * 0.37, leaves), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_loss_of_nothing_and_of_large_logits():
    hidden, weight = torch.randn(6, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    loss = summed_loss(hidden, weight, torch.full((6,), -100), 4)
    loss.backward()
    assert loss == 0 and (hidden.grad == 0).all() and (weight.grad == 0).all()
    huge = torch.full((1, 1), 1e4, requires_grad=True)
    loss = summed_loss(huge, torch.tensor([[1.0], [-1.0]]), torch.tensor([1]), 1)
    loss.backward()
    assert loss.item() == pytest.approx(2e4) and huge.grad.item() == pytest.approx(2.0)


def test_loss_under_autocast_is_within_bf16_of_cross_entropy():
    model, tokens, targets = small_model(init_std=0.1), random_tokens(64), random_tokens(64, 1)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(tokens, targets=targets, loss_chunk_size=10)
        logits = model(tokens)
    assert out.loss.dtype == logits.dtype == torch.float32
    torch.testing.assert_close(out.loss, F.cross_entropy(logits, targets, reduction="sum"), rtol=1e-3, atol=0)
    out.loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("tie", [True, False])
def test_model_loss_is_the_cross_entropy_of_its_logits(tie: bool):
    """Per token and summed, gradients of all weights included; a tied embedding gets both of its gradients."""
    model, tokens, targets = small_model(tie_embeddings=tie, moe={"sequence_loss_weight": 0.0}), random_tokens(90), random_tokens(90, 1)
    targets[30:40] = -100
    per_token = model(tokens, CU_SEQLENS, targets=targets, per_token=True, loss_chunk_size=13)
    out = model(tokens, CU_SEQLENS, targets=targets, loss_chunk_size=13)
    plain = F.cross_entropy(model(tokens, CU_SEQLENS), targets, reduction="none")
    assert isinstance(out, LossOutput) and per_token.loss.shape == (90,) and not per_token.loss.requires_grad
    torch.testing.assert_close(per_token.loss, plain, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out.loss, plain.sum(), rtol=1e-5, atol=1e-3)
    parameters = list(model.parameters())
    expected = torch.autograd.grad(plain.sum(), parameters)
    for (name, _), found, value in zip(model.named_parameters(), torch.autograd.grad(out.loss, parameters), expected, strict=True):
        assert (found - value).norm() <= 1e-4 * value.norm() + 1e-4, name


def test_tied_and_untied():
    tied, untied = small_model(), small_model(tie_embeddings=False)
    assert tied.head is None and untied.head is not None
    names = {name for name, _ in untied.named_parameters()} - {name for name, _ in tied.named_parameters()}
    assert names == {"head.weight"}
    with torch.no_grad():
        untied.head.weight.copy_(untied.embedding.weight)
        assert torch.equal(tied(random_tokens(20)), untied(random_tokens(20)))


# --------------------------------------------------------------------------------------------------------- initial weights


def test_initial_weights_do_not_depend_on_order_or_on_the_global_generator():
    torch.manual_seed(1)
    first = small_model(seed=5).state_dict()
    torch.manual_seed(2)
    deeper = small_model(small_config(num_layers=4), seed=5).state_dict()
    torch.testing.assert_close(first, small_model(seed=5).state_dict(), rtol=0, atol=0)
    same = [name for name, value in first.items() if not name.endswith(("o_proj.weight", "down.weight", "w2"))]
    assert len(same) > 20 and all(torch.equal(first[name], deeper[name]) for name in same), "more layers draw the first ones alike"
    for seed in (6, 5 + 2**32, 2**62 + 5):
        other = small_model(seed=seed).state_dict()
        assert not any(torch.equal(first[name], other[name]) for name in first if first[name].std() > 0), seed
    drawn = [value.flatten()[:8].tolist() for value in first.values() if value.std() > 0]
    assert len({tuple(values) for values in drawn}) == len(drawn), "no two parameters share their numbers"


def test_initial_scales():
    config = small_config(hidden_size=64, num_layers=8, init_std=0.02)
    for name, parameter in small_model(config).named_parameters():
        if "norm" in name:
            assert (parameter == 1).all(), name
        elif name.endswith("bias"):
            assert (parameter == 0).all(), name
        else:
            residual = name.endswith(("o_proj.weight", "mlp.down.weight", "shared.down.weight", "mlp.w2"))
            assert parameter.std().item() == pytest.approx(0.005 if residual else 0.02, rel=0.25), name


def test_initial_weights_clear_the_router_bias():
    model = small_model()
    model.update_router_bias(torch.tensor([[9, 0, 0, 0]]))
    model.init_weights(0)
    torch.testing.assert_close(model.state_dict(), small_model().state_dict(), rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------------------------- sizes


def named(model: str) -> ModelConfig:
    """configs/model/<name>.yaml on top of base.yaml, as Hydra's defaults list has it."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    with initialize_config_dir(str(Path(__file__).resolve().parents[2] / "configs"), version_base=None):
        values: Any = OmegaConf.to_container(compose("config", [f"model={model}"]), resolve=True)
    return build_config(values).model


def counted_by_hand(config: ModelConfig, layer_moe: bool) -> int:
    """Parameters of one layer, from the shapes in the paper's words."""
    h, dk, dv, heads, kv = config.hidden_size, config.head_dim, config.value_dim, config.num_heads, config.num_kv_heads
    attention = h * heads * dk + 3 * h * kv * dk + 3 * h * kv * dv + heads * dv * h
    block = config.nsa.compress_block
    compress = sum(block * d + block * d * d + d * d for d in (dk, dv))
    gate = h * (h // 4) + (h // 4) * 3 * heads + 3 * heads
    if layer_moe:
        moe = config.moe
        mlp = moe.num_experts * h + 3 * h * moe.expert_size * (moe.num_experts + moe.num_shared_experts)
    else:
        mlp = 3 * h * config.intermediate_size
    return attention + compress + gate + mlp + 2 * h


@pytest.mark.parametrize("model", ["tiny", "base", "large", "nsa_27b"])
def test_count_parameters(model: str):
    config = named(model)
    total, active = count_parameters(config)
    tables = config.vocab_size * config.hidden_size * (1 if config.tie_embeddings else 2)
    layers = sum(counted_by_hand(config, config.layer_has_experts(i)) for i in range(config.num_layers))
    assert total == tables + layers + config.hidden_size
    idle = (config.moe.num_experts - config.moe.top_k) * 3 * config.hidden_size * config.moe.expert_size
    assert active == total - idle * (config.num_layers - config.moe.num_dense_layers)


def test_sizes_are_what_their_names_say(capsys: pytest.CaptureFixture[str]):
    totals = {model: count_parameters(named(model)) for model in ("tiny", "base", "large", "nsa_27b")}
    with capsys.disabled():
        for model, (total, active) in totals.items():
            print(f"\n{model}: {total / 1e9:.4f} B parameters, {active / 1e9:.4f} B active for a token", end=" ")
    assert totals["tiny"][0] < 5e6
    assert 0.1e9 <= totals["base"][1] <= 0.2e9
    assert totals["large"][0] == pytest.approx(1.8e9, rel=0.03)


def test_the_27b_has_the_expert_width_that_comes_nearest():
    config = named("nsa_27b")
    assert config.moe.expert_size % 16 == 0

    met = config.moe.top_k + config.moe.num_shared_experts  # experts that a token meets; the dense layer is as wide
    chosen = config.moe.expert_size
    assert config.intermediate_size == met * chosen

    def distance(width: int, dense: int) -> float:
        moe = dataclasses.replace(config.moe, expert_size=width)
        return abs(count_parameters(dataclasses.replace(config, moe=moe, intermediate_size=dense))[0] - 27e9)

    for neighbour in (chosen - 16, chosen + 16):
        assert distance(chosen, met * chosen) < distance(neighbour, met * neighbour)
        assert distance(chosen, met * chosen) < distance(neighbour, met * chosen), "nor with the dense layer as it is"


# --------------------------------------------------------------------------------------------------------------- bad input

IDS = random_tokens(10)
BAD = {
    "batched": ("tokens", {"tokens": IDS[None]}),
    "int32": ("tokens", {"tokens": IDS.int()}),
    "id too large": ("tokens", {"tokens": IDS.clone().fill_(VOCABULARY)}),
    "id negative": ("tokens", {"tokens": IDS - 100}),
    "targets short": ("targets", {"targets": IDS[:-1]}),
    "targets dtype": ("targets", {"targets": IDS.int()}),
    "targets too large": ("targets", {"targets": IDS.clone().fill_(VOCABULARY)}),
    "targets negative": ("targets", {"targets": IDS.clone().fill_(-1)}),
    "valid dtype": ("valid", {"targets": IDS, "valid": torch.ones(10)}),
    "valid length": ("valid", {"targets": IDS, "valid": torch.ones(1, dtype=torch.bool)}),
    "chunk": ("loss_chunk_size", {"targets": IDS, "loss_chunk_size": -1}),
    "boundaries end early": ("cu_seqlens", {"cu_seqlens": torch.tensor([0, 9], dtype=torch.int32)}),
    "boundaries are int64": ("cu_seqlens", {"cu_seqlens": torch.tensor([0, 10])}),
    "boundaries are a list": ("cu_seqlens", {"cu_seqlens": [0, 10]}),
}


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("name", BAD)
def test_bad_input_names_the_argument(name: str, attention: str):
    argument, changes = BAD[name]
    with pytest.raises(ValueError, match=rf"^{argument}\b"):
        small_model(attention=attention)(**{"tokens": IDS, **changes})


def test_a_document_past_the_last_position():
    model, tokens = small_model(max_position_embeddings=20), random_tokens(30)
    with pytest.raises(ValueError, match="30 tokens passes max_position_embeddings=20"):
        model(tokens)
    with pytest.raises(ValueError, match="21 tokens passes"):
        model(tokens, torch.tensor([0, 9, 30], dtype=torch.int32))
    assert model(tokens, torch.tensor([0, 20, 30], dtype=torch.int32)).shape == (30, VOCABULARY)


def test_no_parameter_is_left_without_a_gradient():
    for attention in ATTENTIONS:
        model = small_model(attention=attention)
        out = model(random_tokens(60), targets=random_tokens(60, 1))
        (out.loss + out.auxiliary).backward()
        without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
        assert without == [], attention


def test_it_learns_a_repeating_text():
    model = Transformer(small_config(init_std=0.1))
    model.init_weights(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    text = random_tokens(9).repeat(8)
    losses = []
    for _ in range(40):
        out = model(text[:-1], targets=text[1:])
        (out.loss / 71).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(out.loss.item() / 71)
    assert losses[0] > 3 and losses[-1] < 0.3, losses[::8]
