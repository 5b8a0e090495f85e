"""Sessions between frontends, over real sockets with a key."""

from __future__ import annotations

import asyncio
import functools

import msgspec
import pytest
from cluster_world import SAME, eventually, made_key
from peer_frontends import Frontend, linked, play, until_joined
from peer_messages import opened, yielded

from sglang_kevlar.control.session import Joined
from sglang_kevlar.frontend.peers import links as links_module
from sglang_kevlar.protocol.records import Complete, decoder

KEY = made_key()
A, B, C = (functools.partial(Frontend, name, KEY) for name in "abc")


def test_each_two_have_one_session_and_the_first_by_name_dials():
    async def script(fs: list[Frontend]) -> None:
        linked(*fs)
        await until_joined(fs)
        a, b, _c = fs
        assert a.handler.peers["b"] == b.identity and b.handler.peers["a"] == a.identity
        assert [sorted(f.links._diallers) for f in fs] == [["b", "c"], ["c"], []]
        assert [len(f.listener.sessions._by_session) for f in fs] == [0, 1, 2]

    play(script, A, B, C)


def test_what_is_sent_arrives_in_order_both_ways():
    async def script(fs: list[Frontend]) -> None:
        linked(*fs)
        await until_joined(fs)
        a, b = fs
        for number in range(200):
            # One of its pieces is as large as several others.
            records = [yielded("r", number, number, b"x" * (number * 100)), Complete()]
            a.links.send("b", records)
            b.links.send("a", [*records, opened(f"r{number}")])
            if number % 50 == 0:
                await asyncio.sleep(0)
        await eventually(lambda: len(b.handler.messages) == 400 and len(a.handler.messages) == 600)
        assert [m.number for m in b.handler.messages if not isinstance(m, Complete)] == list(range(200))
        assert [m.rid for m in a.handler.messages[2::3]] == [f"r{number}" for number in range(200)]

    play(script, A, B)


def test_many_go_in_pieces_that_a_frame_takes(monkeypatch: pytest.MonkeyPatch):
    sizes: list[int] = []
    monkeypatch.setattr(links_module, "PIECE", 10_000)

    async def script(fs: list[Frontend]) -> None:
        linked(*fs)
        await until_joined(fs)
        a, b = fs
        requests = a.links._send_pieces
        a.links._send_pieces = lambda name, pieces: (sizes.append(sum(map(len, pieces))), requests(name, pieces))
        a.links.send("b", [yielded("r", number, number, b"x" * 3_000) for number in range(20)])
        await eventually(lambda: len(b.handler.messages) == 20)
        assert len(sizes) == 7 and max(sizes) <= 10_000

    play(script, A, B)


def test_who_has_another_key_is_not_let_in():
    async def script(fs: list[Frontend]) -> None:
        linked(*fs)
        await asyncio.sleep(1.0)
        assert all(not f.handler.log for f in fs)

    play(script, A, functools.partial(Frontend, "b", made_key()))


@pytest.mark.parametrize("listens", ["a", "b"])
def test_one_that_is_not_expected_is_sent_away(listens: str):
    """Whoever of the two dials."""

    async def script(fs: list[Frontend]) -> None:
        known, stranger = fs
        names = {"a": known.address, "b": known.address} if listens == "a" else {"c": known.address}
        known.link({known.identity.name: known.address, "other": "127.0.0.1:1"})
        stranger.link({stranger.identity.name: stranger.address, **names})
        await asyncio.sleep(1.0)
        assert not known.handler.log and known.listener.sessions._by_session == {}
        assert "joined" not in [what for what, _ in stranger.handler.log] or stranger.handler.log[-1][0] == "left"

    if listens == "a":
        # "0" dials "a" and finds it; "a" does not know of a "0".
        play(script, A, functools.partial(Frontend, "0", KEY))
    else:
        play(script, functools.partial(Frontend, "c", KEY), B)


def test_another_than_who_should_be_there_is_none(caplog: pytest.LogCaptureFixture):
    async def script(fs: list[Frontend]) -> None:
        a, c = fs
        c.link({"c": c.address, "a": "127.0.0.1:1"})
        a.link({"a": a.address, "b": c.address})
        await eventually(lambda: "there is frontend c, not b" in caplog.text)
        assert "b" not in a.handler.peers and "c" not in a.handler.peers

    play(script, A, C)


def test_who_is_to_be_dialled_does_not_dial():
    """b finds a's address among its peers, and a dials b: a second session, the other way round, is ended."""

    async def script(fs: list[Frontend]) -> None:
        a, b = fs
        linked(a, b)
        await until_joined(fs)
        # As if the names were the other way round for b.
        event = Joined("s-wrong", b.identity, next(iter(b.listener.sessions)).state)
        a.links.on_session(event)
        assert not a.links.owns(event.__class__ and next(iter(b.handler.log))) and a.links._names == {}
        assert set(a.handler.peers) == {"b"}

    play(script, A, B)


def test_frontends_of_other_models_do_not_join(caplog: pytest.LogCaptureFixture):
    other = msgspec.structs.replace(SAME, model_digest="other")

    async def script(fs: list[Frontend]) -> None:
        linked(*fs)
        await eventually(lambda: "refuses this one for good" in caplog.text)
        assert "model_digest" in caplog.text and all(not f.handler.log for f in fs)

    play(script, A, functools.partial(Frontend, "b", KEY, configuration=other))


@pytest.mark.parametrize("speaker", [0, 1])
@pytest.mark.parametrize("payload", [b"", b"\xc1\xc1", b"\x92\x01\x02", msgspec.msgpack.encode([{"type": "new"}])])
def test_what_is_no_record_ends_the_session_and_the_next_begins(speaker: int, payload: bytes):
    """Whichever of them dials."""

    async def script(fs: list[Frontend]) -> None:
        linked(*fs)
        await until_joined(fs)
        one, other = fs[speaker], fs[1 - speaker]
        name = other.identity.name
        if (session := one.links._sessions.get(name)) is not None:
            one.listener.requests(session, 0, payload)
        else:
            one.links._diallers[name].outputs(0, payload)
        await eventually(lambda: [what for what, _ in other.handler.log] == ["joined", "left", "joined"])
        await until_joined(fs)
        assert not other.handler.messages
        one.links.send(name, [Complete()])
        await eventually(lambda: other.handler.messages == [Complete()])

    play(script, A, B)


@pytest.mark.parametrize("speaker", [0, 1])
def test_what_its_owner_cannot_take_in_ends_the_session(speaker: int):
    """It would wait for ever for the word that this was taken in."""

    async def script(fs: list[Frontend]) -> None:
        linked(*fs)
        await until_joined(fs)
        one, other = fs[speaker], fs[1 - speaker]

        def fail(_: object) -> None:
            raise RuntimeError("a mistake")

        other.handler.on_message = fail
        one.links.send(other.identity.name, [Complete()])
        await eventually(lambda: ("left", one.identity.name) in other.handler.log)
        other.handler.on_message = lambda _: None
        await until_joined(fs)
        one.links.send(other.identity.name, [Complete()])
        await eventually(lambda: other.handler.messages == [Complete()])

    play(script, A, B)


def test_what_no_frame_takes_ends_the_session_and_not_the_sender():
    async def script(fs: list[Frontend]) -> None:
        linked(*fs)
        await until_joined(fs)
        a, b = fs
        for one, other in ((a, b), (b, a)):
            one.links.send(other.identity.name, [yielded("r", 0, 1, b"x" * (64 << 20))])
            assert one.handler.log[-1] == ("left", other.identity.name)
            await until_joined(fs)

    play(script, A, B)


def test_one_that_comes_back_joins_again_as_another():
    async def script(fs: list[Frontend]) -> None:
        linked(*fs)
        await until_joined(fs)
        a, b = fs
        address = b.address
        fs.pop().close()
        await eventually(lambda: a.handler.log[-1] == ("left", "b"))
        a.links.send("b", [Complete()])  # goes nowhere
        fs.append(Frontend("b", KEY, instance="b2", address=address))
        fs[1].link({"a": a.address})
        await until_joined(fs)
        assert a.handler.peers["b"].instance == "b2"
        await asyncio.sleep(0.05)
        assert not fs[1].handler.messages

    play(script, A, B)


def test_an_end_that_was_closed_tells_the_other_at_once():
    async def script(fs: list[Frontend]) -> None:
        linked(*fs)
        await until_joined(fs)
        a, b, c = fs
        fs.remove(b)
        b.close()
        assert [what for what in b.handler.log if what[0] == "left"] == [("left", "c"), ("left", "a")]
        await eventually(lambda: ("left", "b") in a.handler.log and ("left", "b") in c.handler.log)
        assert set(a.handler.peers) == {"c"} and set(c.handler.peers) == {"a"}

    play(script, A, B, C)


def test_lists_of_records_are_read_as_they_were_written():
    records = [opened("r"), yielded("r", 0, 1), Complete()]
    raw = msgspec.msgpack.encode([msgspec.Raw(msgspec.msgpack.encode(record)) for record in records])
    assert decoder.decode(raw) == records
