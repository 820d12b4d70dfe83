"""Replayed steps give what `model.decode` gives; and what may not be recorded is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nsa_transformer import Transformer
from nsa_transformer.config import ExpertOffloadingConfig, KVCacheConfig
from nsa_transformer.inference import decoder as module
from nsa_transformer.inference.decoder import Decoder, why_not_recorded
from nsa_transformer.inference.generate import SamplingConfig, generate_batch
from nsa_transformer.memory.expert_offload import offload_experts
from nsa_transformer.models.cache import KVCache

from ..models.small import random_tokens, small_config, small_model


class Replay:
    """A CUDA graph for the CPU: it computes the step that it was made of, into the same logits."""

    made = 0

    def __init__(self, decoder: Decoder, tokens: torch.Tensor) -> None:
        self.decoder, self.tokens = decoder, tokens
        self.moves, self.due = decoder.cache.moves, decoder.cache.compression_due()
        self.logits = torch.empty(len(tokens), decoder.model.config.vocab_size)
        Replay.made += 1

    def replay(self) -> None:
        cache = self.decoder.cache
        assert (cache.moves, cache.compression_due()) == (self.moves, self.due), "what it was made of is no more"
        self.logits.copy_(self.decoder.model.decode_reserved(self.tokens, cache))


@torch.no_grad()
@pytest.mark.parametrize(
    ("changes", "settings", "least"), [({}, None, 8), ({}, KVCacheConfig("fp8", 16), 8), ({"attention": "dense"}, None, 6)], ids=["nsa", "fp8", "dense"]
)
def test_steps_are_recorded_anew_where_memory_moved(
    changes: dict[str, Any], settings: KVCacheConfig | None, least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "why_not_recorded", lambda *_: None)
    monkeypatch.setattr(Decoder, "_record", lambda self, tokens: (graph := Replay(self, tokens), graph.logits))
    monkeypatch.setattr(Replay, "made", 0)
    model = small_model(max_position_embeddings=600, **changes).requires_grad_(False)
    plain, recorded = model.new_cache(3, settings), model.new_cache(3, settings)
    for cache in (plain, recorded):
        for sequence, length in ((0, 100), (2, 8)):  # both even: every other step compresses
            model(random_tokens(length, sequence), cache=cache, sequence=sequence)
    decoder = Decoder(model, recorded)
    for step in range(300):
        tokens = random_tokens(3, step)
        assert torch.equal(decoder(tokens), model.decode(tokens, plain)), step
    assert recorded.lengths == plain.lengths == [400, 0, 308]
    assert least <= Replay.made <= 14, "seldom"


@torch.no_grad()
def test_moves_count_what_is_replaced() -> None:
    model = small_model(max_position_embeddings=600)
    cache, at = model.new_cache(1), []
    model(random_tokens(1), cache=cache)
    for step in range(500):
        before = [x.data_ptr() for layer in cache.layers for x in layer.stores] + [cache.table.data_ptr()]
        moves = cache.moves
        cache.reserve_step(torch.device("cpu"))
        after = [x.data_ptr() for layer in cache.layers for x in layer.stores] + [cache.table.data_ptr()]
        assert (before != after) == (cache.moves > moves)
        if before != after:
            at.append(step)
        cache.count_step()
    assert at == [127, 255, 383], "pages in the second and the fourth, the table in all but the last"


def test_what_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model().requires_grad_(False)
    cache = model.new_cache()
    assert why_not_recorded(model, cache) == "the model is on cpu"
    layer, mlp, weight = model.layers[0].attention, model.layers[1].mlp, model.embedding.weight
    assert "plain PyTorch computes the attention" in str(module._attention_waits(layer, cache, weight))
    assert module._attention_waits(small_model(attention="dense").layers[0].attention, cache, weight) is None
    seen = []
    monkeypatch.setattr(module, "decoding_backend", lambda *args: seen.append((args[0], args[1].shape, args[2].shape, args[4])) or "triton")
    assert module._attention_waits(layer, cache, weight) is None
    assert module._attention_waits(layer, model.new_cache(1, KVCacheConfig("fp8", 16)), weight) is None
    assert seen == [("auto", (0, 4, 8), (0, 2, 8), quantized) for quantized in (False, True)]
    monkeypatch.setenv("NSA_CHECK", "1")
    assert "NSA_CHECK" in str(module._attention_waits(layer, cache, weight))
    assert module._experts_wait(mlp, weight) == "the experts' tokens are counted on the host", "as everywhere but in the kernels"
    monkeypatch.setattr(module, "wait_for_device", lambda x, w2: x.shape != (0, 24))
    assert module._experts_wait(mlp, weight) is None and module._experts_wait(model.layers[0].attention, weight) is None
    mlp.experts = lambda *_: None
    assert "computes the experts" in str(module._experts_wait(mlp, weight))


# ---------------------------------------------------------------------------------------------------------------------- GPU

SPARSE = {
    "hidden_size": 64,
    "head_dim": 64,
    "nsa": {"compress_block": 8, "compress_stride": 4, "select_block": 16, "num_selected": 4, "num_initial": 1, "num_local": 2, "window": 40},
    "moe": {"num_experts": 0},
    "num_layers": 3,
    "max_position_embeddings": 1024,
}
EXPERTS = {"moe": {"num_experts": 8, "top_k": 2, "expert_size": 32}}
CASES = {
    "sparse": ({}, None),
    "fp8": ({}, KVCacheConfig("fp8", 32)),
    "fp8, no threshold": ({}, KVCacheConfig("fp8", 0)),
    "mean": ({"nsa": SPARSE["nsa"] | {"compression": "mean"}}, None),
    "dense": ({"attention": "dense"}, None),
    "window": ({"attention": "window"}, None),
    "experts": (EXPERTS, None),
    "experts, fp8": (EXPERTS, KVCacheConfig("fp8", 32)),
    "experts, dense": (EXPERTS | {"attention": "dense"}, None),
}


def on_gpu(changes: dict[str, Any], dtype: torch.dtype = torch.bfloat16) -> Transformer:
    model = small_model(small_config(**{**SPARSE, **changes})).to("cuda", dtype).requires_grad_(False).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("router.weight"):
            parameter.data = parameter.data.float()
    return model


def filled(model: Transformer, settings: KVCacheConfig | None) -> KVCache:
    """A page is 256 tokens: the first sequence is about to need its second."""
    cache = model.new_cache(4, settings)
    for sequence, length in ((0, 250), (1, 3), (3, 500)):
        model(random_tokens(length, sequence).cuda(), cache=cache, sequence=sequence)
    return cache


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_replayed_steps_are_those_of_the_model(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    changes, settings = CASES[case]
    model = on_gpu(changes)
    plain, recorded = filled(model, settings), filled(model, settings)
    assert why_not_recorded(model, recorded) is None
    made, record = [], Decoder._record
    monkeypatch.setattr(Decoder, "_record", lambda self, tokens: made.append(self.cache.step_kind()) or record(self, tokens))
    decoder, tokens = Decoder(model, recorded), random_tokens(4, 9).cuda()
    live = torch.tensor([0, 1, 3], device="cuda")
    for step in range(280):
        expected, found = model.decode(tokens, plain)[live].float(), decoder(tokens)[live].float()
        scale = expected.abs().max()
        assert (found - expected).abs().max() <= 0.01 * scale, step
        top = expected.topk(2).values
        clear = top[:, 0] - top[:, 1] > 0.02 * scale
        assert torch.equal(found.argmax(-1)[clear], expected.argmax(-1)[clear]), step
        tokens = tokens.index_copy(0, live, expected.argmax(-1))
    assert recorded.lengths == plain.lengths == [530, 283, 0, 780]
    kinds = {due for due, _ in made}
    assert len(made) == len(set(made)) and kinds == {False, True} and len({moves for _, moves in made}) >= 2, made


@pytest.mark.gpu
@pytest.mark.parametrize("case", ["sparse", "fp8", "dense"])
def test_greedy_texts_are_the_same_recorded_or_not(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    changes, settings = CASES[case]
    model = on_gpu(changes, torch.float32)
    prompts = [random_tokens(length, length).tolist() for length in (250, 3, 60)]
    found = list(generate_batch(model, prompts, 150, SamplingConfig(temperature=0), kv_cache=settings))
    monkeypatch.setattr(module, "why_not_recorded", lambda *_: "for this test")
    assert found == list(generate_batch(model, prompts, 150, SamplingConfig(temperature=0), kv_cache=settings)) and len(found) == 450


@pytest.mark.gpu
@torch.no_grad()
def test_what_waits_is_not_recorded() -> None:
    """In float32 experts count their tokens on the host; a model in training has who knows what around its layers."""
    model = on_gpu(EXPERTS, torch.float32)
    cache = filled(model, None)
    assert why_not_recorded(model, cache) == "the experts' tokens are counted on the host"
    decoder = Decoder(model, cache)
    for step in range(12):
        assert decoder(random_tokens(4, step).cuda()).isfinite()[:2].all()
    model = on_gpu({}).requires_grad_(True)
    assert "in training" in str(why_not_recorded(model, model.new_cache()))


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("pinned", [True, False])
def test_offloaded_experts(pinned: bool) -> None:
    """Page-locked, a step is recorded, whose misses the device brings; pageable it is not."""
    changes = EXPERTS | {"moe": EXPERTS["moe"] | {"expert_size": 64}}
    whole = on_gpu(changes)
    with torch.device("meta"):
        model = Transformer(whole.config)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if name.endswith("router.weight") else torch.bfloat16)
    weights = dict(whole.state_dict())
    for part in model.modules():
        if not hasattr(part, "w13"):
            part.to_empty(device="cuda", recurse=False)
    store = offload_experts(model, torch.device("cuda"), ExpertOffloadingConfig(enabled=True, gpu_budget_gib=0.0003, pin_memory=pinned))
    for name, fill in store.destinations(model).items():
        fill(weights.pop(name).cpu())
    model.load_state_dict(weights, strict=False)
    model.requires_grad_(False).eval()
    assert store.slots < 8, "some are missing"
    plain, cache = filled(whole, None), filled(model, None)
    assert (why_not_recorded(model, cache) is None) == pinned
    decoder = Decoder(model, cache)
    for step in range(140):
        tokens = random_tokens(4, step).cuda()
        expected, found = whole.decode(tokens, plain)[[0, 1, 3]].float(), decoder(tokens)[[0, 1, 3]].float()
        assert (found - expected).abs().max() <= 0.03 * expected.abs().max(), step
    assert store.statistics().misses > 0
