"""`PackLayout` against loops over documents."""

from __future__ import annotations

import pytest
import torch

from nsa_transformer.config import NSAConfig
from nsa_transformer.models.chunk import ChunkPlan, SparseChunkPlan
from nsa_transformer.models.layout import PackLayout
from nsa_transformer.models.rope import RotaryEmbedding

ROPE = RotaryEmbedding(8)
CPU = torch.device("cpu")
GEOMETRIES = {
    "overlapping": NSAConfig(compress_block=8, compress_stride=4, select_block=16, num_selected=4, window=8),
    "l = d": NSAConfig(compress_block=4, compress_stride=4, select_block=8, num_selected=4, window=8),
    "no power of two": NSAConfig(compress_block=9, compress_stride=3, select_block=12, num_selected=4, window=5),
    "d = 1": NSAConfig(compress_block=3, compress_stride=1, select_block=5, num_selected=4, window=5),
}
PACKS = {
    "one": [40],
    "several": [17, 1, 30, 8, 7],
    "empty ones": [0, 12, 0, 0, 25, 0],
    "many short": [1, 2, 3, 4, 5, 6, 7, 8, 9, 10] * 3,
    "nothing": [0],
}


def boundaries(lengths: list[int], padding: int = 0) -> torch.Tensor:
    ends = [0]
    for length in lengths:
        ends.append(ends[-1] + length)
    return torch.tensor(ends + ends[-1:] * padding, dtype=torch.int32)


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("pack", PACKS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_positions_documents_and_compressed_rows(geometry: str, pack: str, padding: int):
    config, lengths = GEOMETRIES[geometry], PACKS[pack]
    total = sum(lengths)
    layout = PackLayout.build(total, boundaries(lengths, padding), config, ROPE, CPU)
    documents, positions, rows, middles = [], [], [], []
    start = 0
    for number, length in enumerate(lengths):
        documents += [number] * length
        positions += range(length)
        for first in range(0, length - config.compress_block + 1, config.compress_stride):
            rows.append([start + first + i for i in range(config.compress_block)])
            middles.append(first + config.compress_block // 2)
        start += length
    assert layout.document.tolist() == documents
    expected = ROPE.rotation(torch.tensor(positions, dtype=torch.int64))
    assert torch.equal(layout.rotation.cos, expected.cos) and torch.equal(layout.rotation.sin, expected.sin)
    assert layout.cmp_rows[: len(rows)].tolist() == rows
    expected = ROPE.rotation(torch.tensor(middles, dtype=torch.int64))
    assert torch.equal(layout.cmp_rotation.cos[: len(rows)], expected.cos) and torch.equal(layout.cmp_rotation.sin[: len(rows)], expected.sin)
    assert len(layout.cmp_rows) == total // config.compress_stride >= len(rows), "the bound known without reading the device"
    assert ((layout.cmp_rows >= 0) & (layout.cmp_rows < max(total, 1))).all(), "surplus rows stay inside the pack"


def test_one_document_is_the_default():
    config = GEOMETRIES["overlapping"]
    a, b = PackLayout.build(20, None, config, ROPE, CPU), PackLayout.build(20, boundaries([20]), config, ROPE, CPU)
    assert torch.equal(a.cu_seqlens, b.cu_seqlens) and torch.equal(a.cmp_rows, b.cmp_rows) and torch.equal(a.document, b.document)


def test_a_chunk_goes_on_from_its_start():
    config = GEOMETRIES["overlapping"]
    layout = PackLayout.chunk(SparseChunkPlan.build(0, 100, 105, torch.ones(5, dtype=torch.int32), config, None), ROPE, CPU)
    assert torch.equal(layout.rotation.cos, ROPE.rotation(torch.arange(100, 105)).cos)
    assert torch.equal(layout.cmp_rotation.sin, ROPE.rotation(torch.tensor([100])).sin), "the block of tokens 96 … 103, at its middle"
    assert layout.cmp_rows.tolist() == [list(range(8))]
    assert layout.cu_seqlens.tolist() == [0, 5] and layout.cu_seqlens.dtype == torch.int32 and layout.document.tolist() == [0] * 5
    layout = PackLayout.chunk(ChunkPlan(0, 7, 9), ROPE, CPU)
    assert torch.equal(layout.rotation.sin, ROPE.rotation(torch.arange(7, 9)).sin) and len(layout.cmp_rows) == len(layout.cmp_rotation.cos) == 0


@pytest.mark.parametrize(
    "cu_seqlens",
    [
        torch.tensor([0, 10]),
        torch.tensor([[0, 10]], dtype=torch.int32),
        [0, 10],
        torch.tensor([0, 9], dtype=torch.int32),
        torch.tensor([1, 10], dtype=torch.int32),
        torch.tensor([0, 11], dtype=torch.int32),
        torch.tensor([0, 7, 3, 10], dtype=torch.int32),
        torch.tensor([0], dtype=torch.int32),
        torch.tensor([], dtype=torch.int32),
        torch.tensor([0, 10], dtype=torch.int32, device="meta"),
    ],
    ids=lambda cu: f"{cu.tolist()} {cu.dtype}" if isinstance(cu, torch.Tensor) and cu.device.type == "cpu" else str(cu),
)
def test_bad_boundaries_name_the_argument(cu_seqlens):
    with pytest.raises(ValueError, match=r"^cu_seqlens is"):
        PackLayout.build(10, cu_seqlens, GEOMETRIES["overlapping"], ROPE, CPU)
