"""Random geometries and packs for hypothesis."""

from __future__ import annotations

from hypothesis import strategies as st

from nsa_transformer import NSAConfig

from .cases import Case, make_case


@st.composite
def geometries(draw) -> NSAConfig:
    stride = draw(st.integers(1, 5))
    overlap = draw(st.integers(1, 4))
    initial, local = draw(st.integers(0, 3)), draw(st.integers(0, 3))
    return NSAConfig(
        compress_block=stride * overlap,
        compress_stride=stride,
        select_block=stride * draw(st.integers(overlap, 6)),
        num_selected=max(1, initial + local + draw(st.integers(0, 3))),
        num_initial=initial,
        num_local=local,
        window=draw(st.integers(1, 40)),
    )


@st.composite
def cases(draw, tails: bool = False) -> Case:
    config = draw(geometries())
    lengths = draw(st.lists(st.one_of(st.integers(0, 3), st.integers(0, 40)), min_size=1, max_size=4))
    lengths_q = q_start = None
    if tails:
        lengths_q = [draw(st.integers(0, min(length, 12))) for length in lengths]
        if draw(st.booleans()):
            q_start = [draw(st.integers(0, length - length_q)) for length, length_q in zip(lengths, lengths_q, strict=True)]
    return make_case(
        lengths,
        config,
        lengths_q=lengths_q,
        q_start=q_start,
        hkv=draw(st.integers(1, 2)),
        group=draw(st.sampled_from([1, 2, 3])),
        dk=draw(st.integers(1, 5)),
        dv=draw(st.integers(1, 5)),
        padding=draw(st.integers(0, 2)),
        unread=draw(st.integers(0, 2)),
        seed=draw(st.integers(0, 2**20)),
    )
