"""The lists of the Triton pipeline, as they are built in the interpreter, against plain Python."""

from __future__ import annotations

import random

import pytest
import torch

from nsa_transformer.kernels import dispatch

pytestmark = pytest.mark.skipif(dispatch.triton_missing() is not None, reason=f"no Triton here: {dispatch.triton_missing()}")

SELECT, HKV, NUM = 4, 2, 6


@pytest.mark.parametrize(
    ("group", "rows", "lengths"), [(16, 192, [40, 3]), (4, 192, [60]), (3, 192, [70]), (5, 192, [50]), (8, 64, [30, 7]), (1, 16, [9, 1])], ids=str
)
def test_union_of_a_tile(group, rows, lengths):
    """Taller tiles than the interpreter's own launches have, as on compute capability 9.0: 64-bit members, groups that do not divide the rows."""
    from nsa_transformer.kernels.triton import lists

    draw = random.Random(0)
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    blocks = torch.full((sum(lengths), HKV, NUM), -1, dtype=torch.int32)
    for document, length in enumerate(lengths):
        for t in range(length):
            for head in range(HKV):
                visible = range(t // SELECT + 1)
                chosen = sorted(draw.sample(visible, min(NUM, len(visible))))
                blocks[cu[document] + t, head, : len(chosen)] = torch.tensor(chosen, dtype=torch.int32)
    counts = [-(-length * group // rows) for length in lengths]
    tiles = torch.tensor([0, *counts]).cumsum(0).int()
    union = lists.make_union(blocks, sum(lengths), cu, torch.zeros(len(lengths), dtype=torch.int32), tiles, int(tiles[-1]) + 1, group, rows, SELECT)
    every_bit = (1 << (64 if union.members.dtype == torch.int64 else 32)) - 1
    for document, length in enumerate(lengths):
        for number in range(counts[document]):
            first = number * rows // group
            tile = int(tiles[document]) + number
            for head in range(HKV):
                want: dict[int, int] = {}
                for t in range(first, min((number * rows + rows + group - 1) // group, length)):
                    for block in blocks[cu[document] + t, head].tolist():
                        if block >= 0:
                            want[block] = want.get(block, 0) | 1 << (t - first)
                count = int(union.counts[tile, head])
                got = zip(union.blocks[tile, head, :count].tolist(), union.members[tile, head, :count].tolist(), strict=True)
                assert {block: members & every_bit for block, members in got} == want
                assert union.blocks[tile, head, :count].tolist() == sorted(want)
