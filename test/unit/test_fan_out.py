"""Control requests: one answer from each group that serves, a deadline, and the name of who is missing."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import pytest
from fastapi import HTTPException

from sglang_kevlar.frontend.fan_out import GroupCommunicator

A, B = (0, 1), (1, 4)


@dataclass
class Answer:
    success: bool = True
    who: str = ""


class Groups:
    def __init__(self, *members: tuple[int, int], timeout: float = 20.0) -> None:
        self.members = set(members)
        self.sent: list[Any] = []
        self.disagreed: list[tuple[str, set[tuple[int, int]]]] = []
        self.undone: list[Any] = []
        self.disagreement_ends_them = False
        self.ask = GroupCommunicator("do_it", self.ready, self.send, self.disagree, self.nobody_did, timeout)

    async def ready(self) -> None: ...

    def send(self, request: Any) -> set[tuple[int, int]]:
        self.sent.append(request)
        return set(self.members)

    def disagree(self, request: Any, name: str, failed: dict[tuple[int, int], str]) -> bool:
        self.disagreed.append((name, set(failed)))
        return self.disagreement_ends_them

    def nobody_did(self, request: Any, name: str, failed: dict[tuple[int, int], str]) -> None:
        self.undone.append((request, set(failed)))

    async def call(self, request: Any, *answers: tuple[tuple[int, int], Any]) -> list[Any]:
        sent = len(self.sent)
        call = asyncio.ensure_future(self.ask(request))
        while len(self.sent) == sent:
            await asyncio.sleep(0)
        for member, answer in answers:
            self.ask.on_answer(member, answer)
        return await call


def test_one_answer_from_each_group_in_order_of_the_groups():
    async def main() -> None:
        groups = Groups(B, A)
        answers = await groups.call("x", (B, Answer(who="b")), (A, Answer(who="a")))
        assert [answer.who for answer in answers] == ["a", "b"]
        assert groups.sent == ["x"] and not groups.disagreed and not groups.undone

    asyncio.run(main())


def test_no_group_serves():
    async def main() -> None:
        groups = Groups()
        with pytest.raises(HTTPException) as raised:
            await groups.ask("x")
        assert raised.value.status_code == 503 and "do_it" in raised.value.detail
        assert groups.undone == [("x", set())]

    asyncio.run(main())


def test_a_group_that_does_not_answer_is_named():
    async def main() -> None:
        groups = Groups(A, B, timeout=0.05)
        with pytest.raises(HTTPException) as raised:
            await groups.call("x", (A, Answer()))
        assert raised.value.status_code == 504
        assert "group 1 did not answer" in raised.value.detail
        # Another did it: what the silent one serves from now on is not known.
        assert groups.disagreed == [("do_it", {B})]

    asyncio.run(main())


def test_a_late_answer_is_not_taken_for_the_next_request_s():
    async def main() -> None:
        groups = Groups(A, B, timeout=0.05)
        with pytest.raises(HTTPException):
            await groups.call("x", (A, Answer()))
        groups.ask._timeout = 20.0
        answers = await groups.call("y", (B, Answer(who="to x")), (A, Answer(who="a")), (B, Answer(who="b")))
        assert [answer.who for answer in answers] == ["a", "b"]

    asyncio.run(main())


def test_what_the_groups_did_is_compared_also_when_the_caller_leaves():
    async def main() -> None:
        groups = Groups(A, B)
        call = asyncio.ensure_future(groups.ask("x"))
        await asyncio.sleep(0.01)
        call.cancel()
        await asyncio.sleep(0.01)
        groups.ask.on_answer(A, Answer(who="to x"))
        groups.ask.on_answer(B, Answer(success=False))
        await asyncio.sleep(0.01)
        assert groups.disagreed == [("do_it", {B})]
        answers = await groups.call("y", (A, Answer(who="to y")), (B, Answer(who="to y")))
        assert [answer.who for answer in answers] == ["to y", "to y"]

    asyncio.run(main())


def test_what_a_lost_incarnation_owed_is_forgotten():
    async def main() -> None:
        groups = Groups(A, timeout=0.05)
        with pytest.raises(HTTPException):
            await groups.ask("x")
        groups.ask.on_group_lost(A)
        groups.ask._timeout = 20.0
        (answer,) = await groups.call("y", (A, Answer(who="to y")))
        assert answer.who == "to y"

    asyncio.run(main())


def test_a_group_lost_meanwhile_is_not_waited_for():
    async def main() -> None:
        groups = Groups(A, B)
        call = asyncio.ensure_future(groups.ask("x"))
        while not groups.sent:
            await asyncio.sleep(0)
        groups.ask.on_answer(A, Answer(who="a"))
        groups.ask.on_group_lost(B)
        assert [answer.who for answer in await call] == ["a"]

    asyncio.run(main())


def test_an_answer_of_a_group_that_was_lost_afterwards_does_not_count():
    async def main() -> None:
        groups = Groups(A, B)
        call = asyncio.ensure_future(groups.ask("x"))
        while not groups.sent:
            await asyncio.sleep(0)
        groups.ask.on_answer(B, Answer(success=False))
        groups.ask.on_group_lost(B)
        groups.ask.on_answer(A, Answer(who="a"))
        assert [answer.who for answer in await call] == ["a"]
        assert not groups.disagreed

    asyncio.run(main())


def test_all_groups_lost():
    async def main() -> None:
        groups = Groups(A)
        call = asyncio.ensure_future(groups.ask("x"))
        while not groups.sent:
            await asyncio.sleep(0)
        groups.ask.on_group_lost(A)
        with pytest.raises(HTTPException) as raised:
            await call
        assert raised.value.status_code == 503 and "lost" in raised.value.detail
        assert groups.undone == [("x", set())]  # or every group that starts would be sent what ended them

    asyncio.run(main())


def test_strangers_do_not_count():
    async def main() -> None:
        groups = Groups(A)
        groups.ask.on_answer(A, Answer(who="early"))
        (answer,) = await groups.call("x", ((0, 2), Answer(who="other epoch")), (A, Answer(who="a")))
        assert answer.who == "a"

    asyncio.run(main())


def test_failures_come_first_and_a_disagreement_is_told():
    async def main() -> None:
        groups = Groups(A, B)
        answers = await groups.call("x", (A, Answer(who="a")), (B, Answer(success=False, who="b")))
        assert [answer.who for answer in answers] == ["b", "a"]
        assert groups.disagreed == [("do_it", {B})] and not groups.undone

    asyncio.run(main())


@dataclass
class Said(Answer):
    message: str = "fine"


def test_where_those_that_failed_start_again_the_others_answer_for_all():
    async def main() -> None:
        groups = Groups(A, B, timeout=0.05)
        groups.disagreement_ends_them = True
        (answer,) = await groups.call("x", (A, Said()), (B, Said(success=False, message="no disk")))
        assert answer.success and answer.message == "fine (worker group 1 failed and starts again: no disk)"
        (answer,) = await groups.call("y", (B, Said()))
        assert answer.success and "worker group 0 failed and starts again: no answer within" in answer.message
        assert groups.disagreed == [("do_it", {B}), ("do_it", {A})] and not groups.undone

    asyncio.run(main())


def test_a_failure_and_a_silence_are_nobody_s_doing():
    async def main() -> None:
        groups = Groups(A, B, timeout=0.05)
        with pytest.raises(HTTPException) as raised:
            await groups.call("x", (A, Answer(success=False)))
        assert raised.value.status_code == 504
        assert not groups.disagreed and groups.undone == [("x", {A, B})]

    asyncio.run(main())


def test_what_all_refuse_is_no_disagreement_and_undone():
    async def main() -> None:
        groups = Groups(A, B)
        answers = await groups.call("x", (A, Answer(success=False)), (B, Answer(success=False)))
        assert len(answers) == 2 and not groups.disagreed and groups.undone == [("x", {A, B})]

    asyncio.run(main())


def test_callers_are_served_one_after_the_other():
    async def main() -> None:
        groups = Groups(A)
        first, second = asyncio.ensure_future(groups.ask("1")), asyncio.ensure_future(groups.ask("2"))
        await asyncio.sleep(0.01)
        assert groups.sent == ["1"]
        groups.ask.on_answer(A, Answer(who="one"))
        assert (await first)[0].who == "one"
        await asyncio.sleep(0)
        assert groups.sent == ["1", "2"]
        groups.ask.on_answer(A, Answer(who="two"))
        assert (await second)[0].who == "two"

    asyncio.run(main())
