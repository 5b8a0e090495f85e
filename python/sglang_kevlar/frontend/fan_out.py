"""Control requests to all groups: one answer from each, a deadline, and the name of who did not answer."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import Any

from fastapi import HTTPException

GroupEpoch = tuple[int, int]


class GroupCommunicator:
    """Stands in for upstream's FanOutCommunicator, which counts anonymous answers and waits for ever.

    Expects one answer from every group that serves when the request is sent. A group lost meanwhile is not waited
    for: when it is back it is brought up to date before it serves (`frontend.replay`).
    """

    def __init__(
        self,
        name: str,
        send: Callable[[Any], set[GroupEpoch]],
        disagree: Callable[[Any, str, dict[GroupEpoch, str]], None],
        nobody_did: Callable[[Any], None],
        timeout: float,
    ) -> None:
        """``send`` returns to whom it sent; ``disagree`` is told which groups failed, and why, when others did not;
        ``nobody_did`` of a request that no group accepted."""
        self._name = name
        self._send = send
        self._disagree = disagree
        self._nobody_did = nobody_did
        self._timeout = timeout
        self._one_at_a_time = asyncio.Lock()
        self._expected: set[GroupEpoch] = set()
        self._answers: dict[GroupEpoch, Any] = {}
        #: answers that callers did not wait for; they are not those of the next request
        self._owed: Counter[GroupEpoch] = Counter()
        self._changed = asyncio.Event()

    def set_fan_out(self, fan_out: int) -> None:
        """Upstream's interface; the groups that serve are the fan-out."""

    async def __call__(self, request: Any) -> list[Any]:
        """The groups' answers, failures first (some of upstream's callers read the first only).

        Raises HTTPException 503 when no group serves or none is left, 504 naming the groups that did not answer.
        """
        async with self._one_at_a_time:
            self._answers = {}
            self._expected = self._send(request)
            if not self._expected:
                self._nobody_did(request)
                raise HTTPException(503, f"{self._name}: no worker group serves")
            try:
                async with asyncio.timeout(self._timeout):
                    while not self._expected <= self._answers.keys():
                        self._changed.clear()
                        await self._changed.wait()
            except TimeoutError:
                silent = sorted(self._expected - self._answers.keys())
                # Whatever they answer later, nobody will compare it with what the others did.
                self._disagree(request, self._name, dict.fromkeys(silent, f"no answer within {self._timeout:g} s"))
                missing = ", ".join(str(group) for group, _ in silent)
                raise HTTPException(
                    504, f"{self._name}: worker group {missing} did not answer within {self._timeout:g} s"
                ) from None
            finally:
                expected, self._expected = self._expected, set()
                self._owed.update(expected - self._answers.keys())
            if not expected:
                raise HTTPException(503, f"{self._name}: the worker groups were lost before they answered")
            answers = {member: self._answers[member] for member in sorted(expected)}
            failed = {member: answer for member, answer in answers.items() if not getattr(answer, "success", True)}
            if len(failed) == len(answers):
                self._nobody_did(request)
            elif failed:
                self._disagree(request, self._name, {member: reason_of(answer) for member, answer in failed.items()})
            return [*failed.values(), *(answer for member, answer in answers.items() if member not in failed)]

    def on_answer(self, member: GroupEpoch, answer: Any) -> None:
        if self._owed[member]:
            self._owed[member] -= 1
        elif member in self._expected:
            self._answers[member] = answer
            self._changed.set()

    def on_group_lost(self, member: GroupEpoch) -> None:
        self._expected.discard(member)
        self._owed.pop(member, None)
        self._changed.set()


def reason_of(answer: Any) -> str:
    """What a failed answer says; upstream's answers have one of two names for it."""
    return getattr(answer, "message", None) or getattr(answer, "error_message", "") or "no reason given"
