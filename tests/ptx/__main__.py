"""`python -m tests.ptx`: what the launches of a decode step at 7B ask of each multiprocessor of an H100."""

from __future__ import annotations

import math

from tests.ilora.ptx_cases import linear, route
from tests.ptx.count import Counts

# NVIDIA, H100 SXM: multiprocessors, boost clock in Hz; what a copy may reach in bytes a second.
MULTIPROCESSORS, CLOCK, BANDWIDTH = 132, 1.755e9, 3.0e12
FOLDED, ADAPTER = {"k2": 384, "planes": 2}, {"rank": 128, "experts": 3}
LAUNCHES = {
    "q, k, v": (linear, (1, 4608, 3584, 4, 128), {**FOLDED, "splits": (3584, 4096)}),
    "o": (linear, (1, 3584, 3584, 4, 128), FOLDED),
    "gate, up": (linear, (1, 37888, 3584, 4, 128), {**FOLDED, "splits": (18944,)}),
    "down": (linear, (1, 3584, 18944, 4, 128), FOLDED),
    "route of q, k, v": (route, (1, 3584, 8, 128), {**ADAPTER, "groups": 3}),
    "route of gate, up": (route, (1, 3584, 8, 128), {**ADAPTER, "groups": 2}),
    "route of o": (route, (1, 3584, 8, 128), {**ADAPTER, "groups": 1}),
    "route of down": (route, (1, 18944, 8, 128), {**ADAPTER, "groups": 1}),
}


def main() -> None:
    """Prints clocks: of issuing and of shared memory by counting, of memory by dividing bytes."""
    print("| launch | programs | issuing | shared memory | without conflicts | memory |")
    print("|---|---|---|---|---|---|")
    for name, (make, sizes, options) in LAUNCHES.items():
        case, counts = make(*sizes, **options), Counts()
        made = case.compile(90)
        # All programs are alike, and a launch ends with the multiprocessor that has most of them.
        case.run(made, only=lambda x, y, z: y == 1, counts=counts)
        # Moves between registers vanish in machine code.
        del counts.instructions["mov"]
        each = math.ceil(made.programs / MULTIPROCESSORS)
        sums = [each * sum(one.values()) for one in (counts.instructions, counts.turns, counts.least)]
        memory = sum(one.nbytes for one in case.operands) / BANDWIDTH * CLOCK
        issuing, turns, least = sums[0] / 4, sums[1], sums[2]
        print(f"| {name} | {made.programs} | {issuing:.0f} | {turns:.0f} | {least:.0f} | {memory:.0f} |")


if __name__ == "__main__":
    main()
