"""Which group keeps the shadow of which."""

from __future__ import annotations

from collections.abc import Collection


def partners(up: Collection[int], draining: Collection[int], active_groups: int) -> dict[int, int]:
    """Target by source, over the groups that are ``up``; groups ``0 .. active_groups - 1`` are active.

    With standbys up, each active group shadows to one of them, in turn; a standby that serves shadows to another
    standby, or to an active group if there is none. Without, every group shadows to the next one, around the ring.
    A group that drains is about to go, and is chosen only when there is nobody else.
    """
    targets: dict[int, int] = {}
    lasting = [group for group in sorted(up) if group not in draining]
    for source in sorted(up):
        others = [group for group in lasting if group != source] or [group for group in sorted(up) if group != source]
        standbys = [group for group in others if group >= active_groups]
        if not others:
            continue
        if standbys and source < active_groups:
            targets[source] = standbys[source % len(standbys)]
        else:
            ring = standbys or others
            targets[source] = next((group for group in ring if group > source), ring[0])
    return targets
