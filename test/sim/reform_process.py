"""The processes of the group in `reform_world`, and the template that they are forked of."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reform_world import World

SEATS = ("rank0", "rank1", "detokenizer")
SPARES = ("rank0", "rank1")
#: most seconds that a process takes for its imports and weights, and an epoch to bind
LOADS, BINDS, LEAVES = 4.0, 1.0, 0.1


class Process:
    """The truth about one, and what the group's supervisor has in hand of it (`course.Occupant`)."""

    def __init__(self, world: World, pid: int, name: str, in_place: bool) -> None:
        self.world = world
        self.pid = pid
        self.name = name
        self.in_place = in_place
        self.is_rank = name.startswith("rank")
        #: loading, waiting, binding, serving, leaving; dead, reaped
        self.state = "loading"
        self.left = world.faults.random.uniform(0.1, LOADS)
        self.halted = False
        self.hung = False
        self.loaded = False
        #: in which a peer has died under it, so that it can only leave or end
        self.alone = False
        #: of it, as it knows; and the order that it has not read yet
        self.epoch = 0
        self.order: int | None = None
        self.asked = False
        self.error = ""
        #: how it died, if by itself, and when its supervisor sees it
        self.by_itself = False
        self.seen_at = 0.0
        #: a fault has struck it: nothing is expected of it any more
        self.struck = False
        #: its loop failed for a reason of its own; and requests to leave that it did not hear
        self.broke = False
        self.unheard = 0
        self.outbox: deque[dict[str, Any]] = deque()
        # what the supervisor has in hand
        self.told = 0
        self.ready = self.can_leave = self.leaving = False

    @property
    def process(self) -> Process:
        return self

    @property
    def alive(self) -> bool:
        return self.state not in ("dead", "reaped")

    @property
    def in_epoch(self) -> bool:
        return self.state in ("binding", "serving", "leaving")

    def kill(self) -> None:
        if self.alive:
            self.world.judge.killed(self)
            self.die(by_itself=False)

    def ending(self) -> bool:
        return not self.alive

    def stopped(self) -> bool:
        return self.halted and self.alive

    def ask_to_leave(self) -> None:
        # A signal; one that comes when nobody listens for it is lost.
        if self.state == "serving" and not self.asked:
            self.asked = not self.world.faults.strike("request not heard", 0.1)
            self.unheard += not self.asked

    def die(self, by_itself: bool) -> None:
        self.state, self.by_itself = "dead", by_itself
        # Its first thread is gone, and the rest of it takes its time.
        slow = self.world.faults.strike("ends slowly", 0.2)
        self.seen_at = self.world.now + (self.world.faults.random.uniform(0.2, 2.0) if slow else 0.0)
        for peer in self.world.processes:
            if peer is not self and peer.in_epoch and peer.epoch == self.epoch and self.is_rank and peer.is_rank:
                peer.alone = True

    def say(self, status: str, **more: Any) -> None:
        self.outbox.append({"status": status, "epoch": self.epoch, **more})

    # ---- a step of its life

    def live(self, passed: float) -> None:
        if not self.alive or self.halted or self.hung:
            return
        self.left -= passed
        getattr(self, f"on_{self.state}")()

    def on_loading(self) -> None:
        if self.left > 0:
            return
        if self.world.faults.strike("load fails", 0.05) or (
            self.is_rank and not self.in_place and not self.world.loads_first_works
        ):
            self.fail("cannot load")
        else:
            self.state, self.loaded = "waiting", True
            self.say("loaded", can_leave=self.is_rank and not self.in_place)

    def fail(self, error: str) -> None:
        self.struck = True
        self.say("error", error=error)
        self.die(by_itself=True)

    def on_waiting(self) -> None:
        if self.order is not None:
            self.epoch, self.order = self.order, None
            self.state, self.alone = "binding", False
            self.left = self.world.faults.random.uniform(0.05, BINDS)
            peers = [p for p in self.world.processes if p.name in SEATS and p.told == self.epoch and p is not self]
            self.alone = self.is_rank and any(p.is_rank and not p.alive for p in peers)

    def on_binding(self) -> None:
        if self.alone:
            # Upstream's error, or a collective that waits for ever.
            if self.world.faults.random.random() < 0.5:
                self.fail("its peer is gone")
            else:
                self.hung = True
            return
        ranks = [p for p in self.world.processes if p.is_rank and p.in_epoch and p.epoch == self.epoch]
        if self.left > 0 or (self.is_rank and len(ranks) < len(SPARES)):
            return
        if self.world.faults.strike("binding fails", 0.03) or (
            self.is_rank and self.world.course.reformed and not self.world.reforms_work
        ):
            self.fail("cannot bind")
        elif self.world.faults.strike("binding hangs", 0.02):
            self.hung = self.struck = True
        else:
            self.state = "serving"
            self.asked = False
            self.say("ready")

    def on_serving(self) -> None:
        if self.asked or (self.alone and self.world.faults.random.random() < 0.3):
            self.error = "" if self.asked else "connection closed by peer"
            self.asked = False
            self.state, self.left = "leaving", self.world.faults.random.uniform(0.0, LEAVES)
        elif self.is_rank and self.world.faults.strike("loop fails", 0.0005):
            self.struck = self.broke = True
            self.error = "an error in its loop"
            self.state, self.left = "leaving", 0.0

    def on_leaving(self) -> None:
        if self.left > 0:
            return
        if self.world.faults.strike("does not leave", 0.1):
            self.hung = self.struck = True
        elif not self.loaded or self.in_place:
            self.fail("its scheduler is over")
        else:
            self.state, self.alone = "waiting", False
            self.say("left", error=self.error)


class Warmth:
    """The template, as far as it matters: while it imports, nothing is started."""

    suspect = False

    def __init__(self, world: World) -> None:
        self.world = world
        self.left = 0.0
        #: the start of now was not to be of forks
        self.cold = False

    @property
    def importing(self) -> bool:
        return self.left > 0

    def begin(self, cold: bool) -> None:
        self.cold = cold

    def failed(self) -> None:
        assert not self.world.course.reformed, "forks are blamed for a re-form"

    def succeeded(self) -> None: ...
    def forget(self) -> bool:
        return False
