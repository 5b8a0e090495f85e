"""The real shadow of three ranks (`shadow.rank.RankShadow`) in the simulated world of `shadow_sim`.

Replay one run with ``python test/sim/campaign.py --world shadow --seed N``.
"""

from __future__ import annotations

import contextlib
import logging
import re
import secrets
import zlib
from typing import Any

import pytest
from shadow_sim import ShadowWorld, simulate

from sglang_kevlar.control.shadow_keys import root_key
from sglang_kevlar.control.shadow_link import ShadowLink
from sglang_kevlar.shadow import export, lookup, sender, store
from sglang_kevlar.shadow.rank import RankShadow
from sglang_kevlar.shadow.sender import ShadowSender
from sglang_kevlar.shadow.server import ShadowServer
from sglang_kevlar.shadow.store import DamagedBlock, ShadowStore

SEEDS = 25
FRESH = 4


@pytest.fixture(autouse=True)
def quiet_log():
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def test_what_is_found_is_true_and_a_shadow_becomes_whole():
    worlds = [simulate(seed) for seed in range(SEEDS)]
    assert all(world.faults.counts.total() for world in worlds)
    assert sum(world.promotions for world in worlds) > 8 * SEEDS, "what is judged"
    assert len({kind for world in worlds for kind in world.faults.counts}) >= 31, "kinds of faults"


def test_fresh_seeds():
    first = secrets.randbelow(10**9)
    print(f"seeds {first} to {first + FRESH - 1}")
    for seed in range(first, first + FRESH):
        simulate(seed)


def test_a_seed_replays_and_its_schedule_does():
    first, second = simulate(7), simulate(7)
    assert first.trace == second.trace and first.faults.happened == second.faults.happened
    again = simulate(7, frozenset(first.faults.happened))
    assert again.trace == first.trace and again.faults.counts == first.faults.counts
    assert not simulate(7, frozenset()).faults.counts


# What the invariants are worth: each of these shadows is broken in one place, and must be found out.


def caught(match: str, seeds: int = 40) -> None:
    for seed in range(seeds):
        try:
            simulate(seed)
        except AssertionError as error:
            assert re.search(match, str(error)), error
            return
    pytest.fail("not noticed")


class Whatever(int):
    """A checksum that is any other."""

    def __eq__(self, other: object) -> bool:
        return True

    def __ne__(self, other: object) -> bool:
        return False

    __hash__ = int.__hash__


class Anything(bytes):
    """A digest that is any other."""

    def __eq__(self, other: object) -> bool:
        return True

    def __ne__(self, other: object) -> bool:
        return False

    __hash__ = bytes.__hash__


OTHER_KV = "holds other KV|cached KV is not"
NOT_WHOLE = "believes|does not become whole"


def test_an_acknowledgement_before_storing_is_noticed(monkeypatch):
    real = ShadowStore.put

    def put(self: ShadowStore, *args: Any) -> list[bytes]:
        with contextlib.suppress(DamagedBlock):
            real(self, *args)
        return []

    monkeypatch.setattr(ShadowStore, "put", put)
    caught(NOT_WHOLE)


def test_a_checksum_that_is_not_looked_at_is_noticed(monkeypatch):
    real = store.zlib.crc32
    monkeypatch.setattr(store, "zlib", type("", (), {"crc32": staticmethod(lambda data: Whatever(real(data)))}))
    caught("cached KV is not")


def test_a_digest_that_is_not_looked_at_is_noticed(monkeypatch):
    monkeypatch.setattr(store, "digest", lambda block: Anything())
    caught(OTHER_KV)


def test_bytes_of_another_parcel_that_nobody_compares_are_noticed(monkeypatch):
    """They come along with a message that is right."""
    monkeypatch.setattr(store, "digest", lambda block: Anything())
    monkeypatch.setattr(store, "zlib", type("", (), {"crc32": staticmethod(lambda data: Whatever(zlib.crc32(data)))}))
    monkeypatch.setattr(ShadowWorld, "look", lambda self: None)
    caught(OTHER_KV)


def test_a_broken_connection_that_nobody_is_told_of_is_noticed(monkeypatch):
    """Frames go on under another name, and their sender believes them to be taken."""
    real = ShadowServer._in_session

    def in_session(self: ShadowServer, peer: Any, message: Any, *along: Any) -> None:
        moved = next((old for old, s in self._sessions.items() if s.hello.session == message.session), None)
        if moved is not None and moved != peer:
            session = self._sessions[peer] = self._sessions.pop(moved)
            session.next_sequence = message.sequence
        real(self, peer, message, *along)

    monkeypatch.setattr(ShadowServer, "_in_session", in_session)
    caught(NOT_WHOLE, seeds=150)


def test_a_sequence_number_that_is_not_counted_up_is_noticed(monkeypatch):
    monkeypatch.setattr(ShadowSender, "_next_sequence", lambda self: self._sent_sequence)
    caught("does not become whole")


def test_a_lost_frame_that_nobody_misses_is_noticed(monkeypatch):
    real = ShadowServer._in_session

    def in_session(self: ShadowServer, peer: Any, message: Any, *along: Any) -> None:
        session = self._sessions.get(peer)
        if session is not None and message.sequence > session.next_sequence:
            session.next_sequence = message.sequence
        real(self, peer, message, *along)

    monkeypatch.setattr(ShadowServer, "_in_session", in_session)
    caught(NOT_WHOLE)


def test_a_lost_acknowledgement_that_nobody_misses_is_noticed(monkeypatch):
    never_missing = property(lambda self: Whatever(), lambda self, value: None)
    monkeypatch.setattr(ShadowSender, "_acknowledgements", never_missing, raising=False)
    caught(NOT_WHOLE, seeds=150)


def test_keys_that_are_gone_and_believed_to_be_held_are_noticed(monkeypatch):
    real = ShadowLink.acknowledge
    monkeypatch.setattr(ShadowLink, "acknowledge", lambda self, sequence, gone: real(self, sequence, ()))
    caught(NOT_WHOLE)


def test_a_store_that_does_not_say_what_it_evicted_is_noticed(monkeypatch):
    monkeypatch.setattr(ShadowStore, "take_dropped", lambda self: [])
    caught(NOT_WHOLE)


def test_a_session_with_a_target_that_was_started_anew_is_noticed(monkeypatch):
    real = ShadowSender._step

    def step(self: ShadowSender) -> None:
        if self._wanted is not None and self._target is not None and self._wanted.name == self._target.name:
            self._wanted = self._target
        real(self)

    monkeypatch.setattr(ShadowSender, "_step", step)
    caught(NOT_WHOLE)


def test_weights_that_are_not_part_of_a_name_are_noticed(monkeypatch):
    for module in (export, lookup):
        monkeypatch.setattr(module, "root_key", lambda content, *origin: root_key("", *origin))
    monkeypatch.setattr(ShadowWorld, "look", lambda self: None)  # at what is called how
    monkeypatch.setattr(ShadowWorld, "quiet", lambda self: None)
    caught("cached KV is not", seeds=150)


def test_tenants_that_are_not_part_of_a_name_are_noticed(monkeypatch):
    for module in (export, lookup):
        monkeypatch.setattr(module, "root_key", lambda content, *origin: root_key(content, None, None))
    caught(OTHER_KV)


def test_a_promotion_across_a_weight_update_is_noticed(monkeypatch):
    monkeypatch.setattr(RankShadow, "_forgets", lambda self, message: False)
    caught("cached KV is not", seeds=300)


def test_kv_of_two_weight_versions_is_noticed(monkeypatch):
    def set_content(self: export.Exporter, content: str) -> None:
        self.content = self.content or content  # and never another

    monkeypatch.setattr(export.Exporter, "set_content", set_content)
    caught(OTHER_KV)


def test_a_copy_of_the_wrong_slots_is_noticed(monkeypatch):
    real = sender.pack
    monkeypatch.setattr(sender, "pack", lambda rows, first, *rest: real(rows, max(0, first - 1), *rest))
    caught(OTHER_KV)
