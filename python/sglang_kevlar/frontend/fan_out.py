"""Control requests to all groups: one answer from each, a deadline, and the name of who did not answer."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
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
        ready: Callable[[], Awaitable[None]],
        send: Callable[[Any], set[GroupEpoch]],
        disagree: Callable[[Any, str, dict[GroupEpoch, str]], bool],
        nobody_did: Callable[[Any, str, dict[GroupEpoch, str]], None],
        timeout: float,
    ) -> None:
        """``ready`` is awaited before ``send``, which returns to whom it sent. ``disagree`` is told which groups
        failed, and why, when others did not; it returns whether they are out of service now, so that the others'
        answer is the answer. ``nobody_did`` is told of a request that no group is known to have done, and of those
        that failed."""
        self._name = name
        self._ready = ready
        self._send = send
        self._disagree = disagree
        self._nobody_did = nobody_did
        self._timeout = timeout
        self._one_at_a_time = asyncio.Lock()
        #: sent, and not yet answered by all
        self.under_way: Any = None
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
        # It goes on when the caller leaves: what the groups did has to be compared all the same.
        asking = asyncio.ensure_future(self._ask(request))
        asking.add_done_callback(lambda task: task.cancelled() or task.exception())
        return await asyncio.shield(asking)

    async def _ask(self, request: Any) -> list[Any]:
        async with self._one_at_a_time:
            await self._ready()
            self._answers = {}
            self._expected = self._send(request)
            if not self._expected:
                self._nobody_did(request, self._name, {})
                raise HTTPException(503, f"{self._name}: no worker group serves")
            self.under_way = request
            try:
                async with asyncio.timeout(self._timeout):
                    while not self._expected <= self._answers.keys():
                        self._changed.clear()
                        await self._changed.wait()
            except TimeoutError:
                pass
            finally:
                # What became of it is worked out before anybody else has a turn.
                self.under_way = None
                expected, self._expected = self._expected, set()
                silent = sorted(expected - self._answers.keys())
                self._owed.update(silent)
            answers = {member: self._answers[member] for member in sorted(expected) if member in self._answers}
        return self._result(request, answers, silent)

    def _result(self, request: Any, answers: dict[GroupEpoch, Any], silent: list[GroupEpoch]) -> list[Any]:
        """Of the groups that are left: their answers, and those that did not answer in time."""
        did = {member: answer for member, answer in answers.items() if getattr(answer, "success", True)}
        failed = [answer for member, answer in answers.items() if member not in did]
        why = {member: reason_of(answer) for member, answer in answers.items() if member not in did}
        # Whatever they answer later, nobody will compare it with what the others did.
        why |= dict.fromkeys(silent, f"no answer within {self._timeout:g} s")
        if not did:
            self._nobody_did(request, self._name, why)
        elif why and self._disagree(request, self._name, why):
            said = "; ".join(
                f"worker group {group} failed and starts again: {reason}" for (group, _), reason in why.items()
            )
            return _noted([*did.values()], said)
        if silent:
            missing = ", ".join(str(group) for group, _ in silent)
            raise HTTPException(504, f"{self._name}: worker group {missing} did not answer within {self._timeout:g} s")
        if not answers:
            raise HTTPException(503, f"{self._name}: the worker groups were lost before they answered")
        return [*failed, *did.values()]

    def on_answer(self, member: GroupEpoch, answer: Any) -> None:
        if self._owed[member]:
            self._owed[member] -= 1
        elif member in self._expected:
            self._answers[member] = answer
            self._changed.set()

    def awaits(self, member: GroupEpoch) -> bool:
        return self._owed[member] > 0 or (member in self._expected and member not in self._answers)

    def on_group_lost(self, member: GroupEpoch) -> None:
        self._expected.discard(member)
        self._owed.pop(member, None)
        self._changed.set()


def reason_of(answer: Any) -> str:
    """What a failed answer says; upstream's answers have one of two names for it."""
    return getattr(answer, "message", None) or getattr(answer, "error_message", "") or "no reason given"


def _noted(answers: list[Any], note: str) -> list[Any]:
    for answer in answers[:1]:
        if isinstance(getattr(answer, "message", None), str):
            answer.message = f"{answer.message} ({note})"
    return answers
