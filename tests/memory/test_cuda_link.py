"""What passes between host memory and a device, and when: sums of gradients, parts that the device updates, values that it is sent."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from nsa_transformer.memory import cuda_link
from nsa_transformer.memory.cuda_link import ROOMS, CudaLink, link_to
from nsa_transformer.memory.host import ALIGN, CHUNK, Link, Part, Piece, adamw, part_size

from .stand_ins import Lagging, small_parts

CPU = torch.device("cpu")
NONE = torch.zeros(0)  # of what a sum is of no use for
KEY = "memory.optimizer_offloading.enabled"
OPTIONS = [
    {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1},
    {"lr": 0.02, "betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.0},
]


def sums_of(total: Tensor, size: int) -> list[Part]:
    """Parts of `size` elements, of one parameter, whose sums are in an arena."""
    parts = []
    for number, into in enumerate(total.split(size)):
        piece = Piece(0, slice(0, len(into)), slice(number * size, number * size + len(into)), NONE, number)
        parts.append(Part(0, [piece], NONE, into, NONE, NONE))
    return parts


def add(link: Link, grad: Tensor, parts: list[Part], norms: Tensor, again: bool) -> None:
    link.add([(part, [(piece, grad[piece.of]) for piece in part.pieces]) for part in parts], norms, {0} if again else set(), link.behind())


def put(link: Link, part: Part, grad: Tensor) -> None:
    """A gradient over all of a part."""
    link.add([(part, [(piece, grad[piece.at]) for piece in part.pieces])], torch.zeros(20), set(), link.behind())


@pytest.mark.parametrize("total", [30_000_000, 100_000_000, 350_000_001, 1_794_100_000, 30_000_000_000])
def test_rooms_take_little_of_any_model(total: int) -> None:
    """Of what the optimizer in host memory spares, 14 bytes a parameter, 2 at most for small models and half a byte for others."""
    size = part_size(total)
    assert size % ALIGN == 0 and 4 * (ROOMS * size + min(CHUNK, size)) / total < (2 if total < 1e8 else 0.6)


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_few_parts_and_gradients_that_are_held(monkeypatch: pytest.MonkeyPatch, seed: int | None) -> None:
    """Sums of fewer parts than there are rooms come back before they have left; a gradient's memory stays until it has been read."""
    small_parts(monkeypatch, 64)
    monkeypatch.setattr(cuda_link, "IN_FLIGHT", 1000)
    monkeypatch.setattr(cuda_link, "page_lock", lambda *_: None)
    Lagging(seed).stand_in(monkeypatch)
    link = CudaLink(CPU, 64, 1, KEY)
    total, norms, expected = link.arena(100), torch.zeros(2), torch.zeros(100)
    parts = sums_of(total, 64)
    held: list[tuple[list[Tensor], Any]] = []
    for turn in range(6):
        grad = torch.full((100,), float(turn + 1))
        expected += grad
        add(link, grad, parts, norms, turn > 0)
        held.append(link._held[-1])
        assert all(each.untyped_storage().data_ptr() == grad.data_ptr() for each in held[-1][0]) and len(link._held) == min(turn + 1, 2), (
            "1,000 bytes hold two of them"
        )
        for _, event in held[: -len(link._held)]:
            stream, count = event.place
            assert stream.done >= count, "what is held no more has been read"
    link.settle()
    assert torch.equal(total, expected) and not link._held
    torch.testing.assert_close(norms, torch.stack([part.norm() for part in expected.split(64)]))
    before = total.clone()
    add(link, torch.ones(100), parts, norms, False)  # given up
    link.settle()
    assert torch.equal(total, torch.ones(100)) and not torch.equal(total, before)


# ------------------------------------------------------------------------------------------------ parts that the device updates


def lagging_link(monkeypatch: pytest.MonkeyPatch, seed: int | None, steps: int) -> CudaLink:
    small_parts(monkeypatch, 64)
    monkeypatch.setattr(cuda_link, "page_lock", lambda *_: None)
    Lagging(seed).stand_in(monkeypatch)
    return CudaLink(CPU, 64, steps, KEY)


def parts_of(link: Link, count: int, device: torch.device = CPU) -> list[Part]:
    """Of two parameters each, of which the second is rounded, with gaps between them."""
    arenas = [link.arena(64 * count) for _ in range(4)]
    for flat in arenas:
        flat.copy_(torch.randn(len(flat)))
    arenas[3].square_()  # a second moment
    parts = []
    for number in range(count):
        targets = torch.zeros(30, device=device), torch.zeros(31, dtype=torch.bfloat16, device=device)
        pieces = [
            Piece(2 * number, slice(0, 30), slice(0, 30), targets[0], 2 * number),
            Piece(2 * number + 1, slice(32, 63), slice(0, 31), targets[1], 2 * number + 1),
        ]
        parts.append(Part(number % 2, pieces, *(flat[64 * number :][:64] for flat in arenas)))
    return parts


def updated(parts: list[Part], steps: Tensor, factor: float) -> list[Part]:
    """Copies, updated where they are."""
    parts = copy.deepcopy(parts)
    for part in parts:
        adamw(part, steps, OPTIONS[part.group], factor)
        for piece in part.pieces:
            piece.target.copy_(part.master[piece.at])
    return parts


def differences(parts: list[Part], expected: list[Part]) -> Iterator[tuple[int, str]]:
    """Which parts are not the same bit for bit, and in what; sums are of no use any more."""
    for number, (part, wanted) in enumerate(zip(parts, expected, strict=True)):
        for name in ("master", "first", "second"):
            if not torch.equal(getattr(part, name), getattr(wanted, name)):
                yield number, name
        if not all(torch.equal(piece.target, other.target) for piece, other in zip(part.pieces, wanted.pieces, strict=True)):
            yield number, "target"


def update(link: Link, parts: list[Part], steps: Tensor, factor: float, ready: Any) -> list[Any]:
    """A mark behind each."""
    link.begin_update(steps, ready)
    marks = []
    for part in parts:
        link.update(part, OPTIONS[part.group], factor)
        marks.append(link.updated())
    return marks


@pytest.mark.parametrize("seed", [None, 0, 1, 2, 3])
def test_parts_are_updated_on_their_way_through_the_device(monkeypatch: pytest.MonkeyPatch, seed: int | None) -> None:
    """More parts than there are rooms for, beside sums that are added to next, and others that are written where those of this update were. They take the
    same rooms, which serve each in turn."""
    link = lagging_link(monkeypatch, seed, 20)
    parts, steps = parts_of(link, 10), link.arena(20)
    sums = [link.arena(64) for _ in range(5)]
    for total in sums:
        add(link, torch.ones(64), sums_of(total, 64), torch.zeros(1), False)
    for factor in (0.5, 1.0, 0.25):
        steps += torch.arange(1.0, 21.0)
        expected = updated(parts, steps, factor)
        marks = update(link, parts, steps, factor, link.now())
        for total in sums:
            add(link, torch.ones(64), sums_of(total, 64), torch.zeros(1), True)
        grads = torch.randn(4, 64)
        for part, grad in zip(parts, grads, strict=False):
            put(link, part, grad)
        for number, mark in enumerate(marks):
            mark.synchronize()
            there = slice(number, number + 1)
            assert all(what != "target" for _, what in differences(parts[there], expected[there]))
        link.settle()
        for part, grad in zip(parts, grads, strict=False):
            assert all(torch.equal(part.grad[piece.at], grad[piece.at]) for piece in part.pieces)
        link.finish()
        assert list(differences(parts, expected)) == []
        for part in parts:
            part.grad.copy_(torch.randn(64))
    assert all(bool((total == 4).all()) for total in sums)


def test_a_piece_that_is_left_out_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    link = lagging_link(monkeypatch, None, 2)
    (part,), steps = parts_of(link, 1), link.arena(2).fill_(1)
    before = copy.deepcopy(part)
    update(link, [Part(part.group, part.pieces[:1], *part.tensors)], steps, 1.0, link.now())
    link.finish()
    first, second = (piece.at for piece in part.pieces)
    for tensor, old in zip((part.master, part.first, part.second), (before.master, before.first, before.second), strict=True):
        assert torch.equal(tensor[second], old[second]) and not (tensor[first] == old[first]).any()
    assert not part.pieces[1].target.any()


@pytest.mark.parametrize("how", ["update", "to_device"])
def test_what_passes_still_read_is_not_overwritten(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    link = lagging_link(monkeypatch, None, 2)
    (part,), steps = parts_of(link, 1), link.arena(2).fill_(1)
    seen, passes, ready = torch.ones(30), torch.cuda.Stream(), torch.cuda.Event()
    with torch.cuda.stream(passes):
        seen.copy_(part.pieces[0].target)
    ready.record(passes)
    if how == "update":
        (mark,) = update(link, [part], steps, 1.0, ready)
    else:
        link.begin(ready)
        link.to_device((part.master[piece.at], piece.target) for piece in part.pieces)
        mark = link.sent()
    mark.synchronize()
    assert part.pieces[0].target.any() and not seen.any()


def test_a_gradient_is_read_once_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    link = lagging_link(monkeypatch, None, 1)
    passes = torch.cuda.Stream()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: passes)
    grad, total = torch.zeros(64), link.arena(64)
    with torch.cuda.stream(passes):
        grad.fill_(3)
    add(link, grad, sums_of(total, 64), torch.zeros(1), False)
    link.settle()
    assert bool((total == 3).all())


def test_what_was_sent_may_be_overwritten_after_finish(monkeypatch: pytest.MonkeyPatch) -> None:
    link = lagging_link(monkeypatch, None, 1)
    source, targets = link.arena(32).fill_(1), (torch.zeros(32), torch.zeros(32, dtype=torch.bfloat16))
    link.begin(link.now())
    link.to_device((source, target) for target in targets)
    link.finish()
    source.fill_(2)
    mark = link.sent()
    assert mark is not None
    mark.synchronize()
    assert all(bool((target == 1).all()) for target in targets)


def test_sums_do_not_wait_for_an_update(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step forgets its gradients while its update is still under way."""
    link = lagging_link(monkeypatch, None, 6)
    parts, steps = parts_of(link, 3), link.arena(6).fill_(1)  # as many as there are rooms for
    sums = link.arena(64)
    link.settle()
    add(link, torch.ones(64), sums_of(sums, 64), torch.zeros(1), False)
    before = copy.deepcopy(parts)
    update(link, parts[:2], steps, 1.0, link.now())
    link.settle()
    assert sums.all() and list(differences(parts, before)) == []
    update(link, parts[2:], steps, 1.0, link.now())
    link.finish()
    assert len(list(differences(parts, before))) == 12


# ------------------------------------------------------------------------------------------------------------------ GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 100, 1000, 5000])
def test_what_crosses_the_link_arrives(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, count: int) -> None:
    small_parts(monkeypatch, 1024)
    device = torch.device("cuda", torch.cuda.current_device())
    link = link_to(device, 1024, 1, KEY)
    total, expected = link.arena(count), torch.zeros(count)
    norms = torch.zeros(-(-count // 1024), device=device)
    for turn in range(4):  # the third begins anew
        values = torch.randn(count, device=device).to(dtype)
        expected = values.cpu().float() + (expected if turn % 2 else 0.0)
        add(link, values, sums_of(total, 1024), norms, bool(turn % 2))
        del values
        link.settle()
        assert torch.equal(total, expected)
        torch.testing.assert_close(norms.cpu(), torch.stack([part.norm() for part in expected.split(1024)]))
    targets = [torch.zeros(size, dtype=kind, device=device) for size, kind in ((6, dtype), (100, torch.float32), (7, dtype), (33, torch.bfloat16))]
    for _ in range(5):
        sources = [link.arena(len(target)).copy_(torch.randn(len(target))) for target in targets]
        link.begin(link.now())
        link.to_device(zip(sources, targets, strict=True))
        event = link.sent()
        assert event is not None
        event.synchronize()
        assert all(torch.equal(target.cpu(), source.to(target.dtype)) for source, target in zip(sources, targets, strict=True))


@pytest.mark.gpu
def test_parts_are_updated_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the last bit as if they lay there, and nearly as the host does it."""
    small_parts(monkeypatch, 64)
    device = torch.device("cuda", torch.cuda.current_device())
    link = link_to(device, 64, 20, KEY)
    parts, steps = parts_of(link, 10, device), link.arena(20)
    for factor in (0.3, 1.0, 0.7):
        steps += torch.arange(1.0, 21.0)
        on_host = updated(parts, steps, factor)
        on_gpu = updated([Part(part.group, part.pieces, *(tensor.to(device) for tensor in part.tensors)) for part in parts], steps.to(device), factor)
        mark = update(link, parts, steps, factor, link.now())[-1]
        torch.cuda.current_stream(device).wait_event(mark)
        targets = [piece.target.clone() for part in parts for piece in part.pieces]
        assert all(map(torch.equal, targets, (piece.target for part in on_gpu for piece in part.pieces)))
        link.finish()
        for part, there, near in zip(parts, on_gpu, on_host, strict=True):
            for name in ("master", "first", "second"):
                assert torch.equal(getattr(part, name), getattr(there, name).cpu()), name
                torch.testing.assert_close(getattr(part, name), getattr(near, name), rtol=1e-5, atol=1e-6)
            part.grad.copy_(torch.randn(64))
