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
    start = torch.zeros(len(lengths), dtype=torch.int32)
    per_document = torch.tensor([0, *(-(-length // SELECT) for length in lengths)]).cumsum(0).int()
    num_blocks = int(per_document[-1]) + 1
    chosen = lists.make_choosers(blocks, cu, start, per_document, num_blocks, SELECT, 8)
    union = lists.make_union(blocks, sum(lengths), cu, start, tiles, int(tiles[-1]) + 1, group, rows, SELECT, chosen.places)
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
                # The tile's members of a block stand in a row in the block's list, which is that of all tokens that chose it.
                for entry, (block, members) in enumerate(sorted(want.items())):
                    owner = head * num_blocks + int(per_document[document]) + block
                    begin, end, last = int(chosen.starts[owner]), int(chosen.starts[owner + 1]), int(union.last[tile, head, entry])
                    tokens = [int(cu[document]) + first + bit for bit in range(members.bit_length()) if members >> bit & 1]
                    assert begin <= last < end and chosen.tokens[last + 1 - len(tokens) : last + 1].tolist() == tokens
