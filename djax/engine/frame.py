"""Where the windows of a program lie, and how wide whole canvases are run."""

from typing import NamedTuple

from djax.caching.contract import Policy
from djax.models.family import Family

# The shortest canvas of a batch whose rows are run at widths of their own.
LONG = 512


class Frame(NamedTuple):
    """Where the windows of a program lie. left: positions before the block. width: W, of all. unread: the block's last
    positions that no window reads, since nobody sees them and what they predict comes after the block."""

    left: int
    width: int
    unread: int


def frame_windows(policy: Policy, family: Family, block: int, length: int) -> Frame:
    """The policy's reach around a block, clipped to the canvas. It holds the position that predicts the block's first, and
    where a cache commits what it read, as many before the block as may not be final yet."""
    before, after = (min(reach, length) for reach in policy.reach())
    left = max(before, block if policy.commits else family.shift)
    unread = family.shift if family.visibility == "past" else 0
    width = left + block + after - unread
    return Frame(left, width if left else min(width, length), unread)


def list_widths(batch: int, length: int) -> tuple[int, ...]:
    """The widths at which whole canvases are run, ascending; a row takes the least that holds its canvas, so that a short one
    costs what is its own. Each is compiled: none but the whole where there is one row, or little to save."""
    if batch == 1 or length < LONG:
        return (length,)
    return (*(-(-length // parts // 64) * 64 for parts in (4, 2)), length)
