"""Whose requests run on a group that several frontends share, and who waits for which answer of it."""

from __future__ import annotations

from collections import deque


class Owners:
    """Frontends are numbers. Nothing here outlives an incarnation of the group (`clear`)."""

    def __init__(self) -> None:
        self._by_rid: dict[str, int] = {}
        self._rids: dict[int, dict[str, None]] = {}
        #: by the name of the answer: those who asked, in order; one that is gone is -1 and its answer is nobody's
        self._asked: dict[str, deque[int]] = {}

    def __len__(self) -> int:
        return len(self._by_rid)

    def begin(self, rid: str, frontend: int) -> bool:
        """False: a request of this id runs already."""
        if rid in self._by_rid:
            return False
        self._by_rid[rid] = frontend
        self._rids.setdefault(frontend, {})[rid] = None
        return True

    def owner(self, rid: str | None) -> int | None:
        return None if rid is None else self._by_rid.get(rid)

    def of(self, frontend: int) -> list[str]:
        return list(self._rids.get(frontend, ()))

    def end(self, rid: str) -> None:
        frontend = self._by_rid.pop(rid, None)
        if frontend is not None:
            del self._rids[frontend][rid]

    def forget(self, frontend: int) -> list[str]:
        """It is gone. Returns its requests, which nobody waits for any more."""
        rids = list(self._rids.pop(frontend, ()))
        for rid in rids:
            del self._by_rid[rid]
        for asked in self._asked.values():
            for place, who in enumerate(asked):
                if who == frontend:
                    asked[place] = -1
        return rids

    def ask(self, answer: str, frontend: int) -> None:
        """The group was asked for something that is answered in the order in which it was asked."""
        self._asked.setdefault(answer, deque()).append(frontend)

    def answered(self, answer: str) -> int | None:
        """Whose answer this is; None when nobody waits for it."""
        asked = self._asked.get(answer)
        who = asked.popleft() if asked else -1
        return None if who < 0 else who

    def clear(self) -> None:
        self._by_rid.clear()
        self._rids.clear()
        self._asked.clear()
