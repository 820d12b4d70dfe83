"""Which experts of a layer lie in slots of the GPU, in words of Python: what `kernels/triton/expert_slots.py` decides, and the best that could be."""

from __future__ import annotations

from collections.abc import Sequence

HALVING, USE = 64, 1 << 16  # plans after which uses count half, and what one counts
NEVER = 1 << 62


class SlotPolicy:
    """`lru` or `frequency`: an expert that is needed is never put out, a free slot is taken first, then that of the least priority. Experts that were at hand,
    missing, guessed and guessed right are counted."""

    def __init__(self, slots: int, policy: str) -> None:
        self.owners: list[int | None] = [None] * slots
        self.policy = policy
        self.clock = 0
        self.last_use: dict[int, int] = {}
        self.uses: dict[int, int] = {}
        self.counts = [0, 0, 0, 0]

    def priority(self, expert: int) -> int:
        return (self.last_use if self.policy == "lru" else self.uses).get(expert, 0)

    def plan(self, chosen: Sequence[int], demand: bool = True) -> list[tuple[int, int]]:
        """Make room for the experts of a step, or of a guess (not `demand`): experts to copy, and the slot of each."""
        needed = sorted(set(chosen))
        absent = [expert for expert in needed if expert not in self.owners]
        if demand:
            self.clock += 1
            if self.clock % HALVING == 0:
                self.uses = {expert: n // 2 for expert, n in self.uses.items()}
            for expert in needed:
                self.last_use[expert] = self.clock
                self.uses[expert] = self.uses.get(expert, 0) + USE
            self.counts[0] += len(needed) - len(absent)
            self.counts[1] += len(absent)
        else:
            self.counts[2] += len(absent)
        kept = set(needed) & set(self.owners)
        moves = []
        for expert in absent:
            open_slots = [slot for slot, owner in enumerate(self.owners) if owner not in kept]
            slot = min(open_slots, key=lambda slot: (-1 if (owner := self.owners[slot]) is None else self.priority(owner), slot))
            self.owners[slot] = expert
            kept.add(expert)
            moves.append((expert, slot))
        return moves


def misses(steps: Sequence[Sequence[int]], slots: int, policy: str) -> list[int]:
    """Missing experts of each step of a layer. `lru`, `frequency`, or `best`: with the future known, that expert goes which is needed last (Belady, 1966)."""
    if policy != "best":
        state, found = SlotPolicy(slots, policy), []
        for chosen in steps:
            found.append(len(state.plan(chosen)))
        return found
    upcoming: dict[int, list[int]] = {}
    for number in range(len(steps) - 1, -1, -1):
        for expert in set(steps[number]):
            upcoming.setdefault(expert, []).append(number)
    there: set[int] = set()
    found = []
    for chosen in steps:
        needed = set(chosen)
        for expert in needed:
            upcoming[expert].pop()
        found.append(len(needed - there))
        for _ in range(len(needed | there) - slots):
            there.remove(max(there - needed, key=lambda expert: (upcoming[expert][-1] if upcoming[expert] else NEVER, expert)))
        there |= needed
    return found
