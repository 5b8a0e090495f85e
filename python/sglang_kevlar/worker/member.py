"""One process of a worker group, as its supervisor sees it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence

from sglang_kevlar.launcher.process import describe_exit, spawn
from sglang_kevlar.launcher.status import StatusReader
from sglang_kevlar.protocol.launch import EXIT_WEIGHTS_GONE, member_record
from sglang_kevlar.worker.orders import Order, OrderWriter
from sglang_kevlar.worker.stderr import MemberStderr
from sglang_kevlar.worker.warm_start import WarmStart

#: has a rank leave its epoch (`worker.rank`)
LEAVE = signal.SIGUSR2


class Member:
    """A rank or a detokenizer, from its start to its end; a rank may be of several epochs."""

    def __init__(self, name: str, command: Sequence[str], warm: WarmStart) -> None:
        self.name = name
        #: of which it is a member, 0: of none yet; and whether it serves
        self.epoch = 0
        self.ready = False
        #: whether it can leave an epoch, and was asked to
        self.can_leave = False
        self.leaving = False
        #: what it said when it became ready
        self.init_info: dict[str, object] | None = None
        self.stderr = MemberStderr()
        self._status = StatusReader()
        self._orders = OrderWriter()
        ready, stderr, orders = self._status.writer, self.stderr.writer, self._orders.reader
        forked = warm.fork(name, command, stderr, ready, orders)
        if forked is not None:
            self._orders.let_go()  # now that it is known
        self.process = forked or spawn(
            name,
            [*command, "--ready-fd", str(ready), "--orders-fd", str(orders)],
            pass_fds=[ready, orders],
            stderr=stderr,
        )
        self.stderr.close_writer()
        self._orders.close_reader()
        os.close(ready)

    @property
    def ready_fd(self) -> int:
        return self._status.fileno()

    @property
    def ready_closed(self) -> bool:
        return self._status.closed

    @property
    def record_name(self) -> str:
        """Behind the group's name."""
        return member_record(self.name, self.process.pid)

    def join(self, order: Order) -> None:
        """Have it be part of an epoch."""
        self.epoch, self.ready, self.init_info = order.epoch, False, None
        self._orders.send(order)

    def ask_to_leave(self) -> None:
        self.process.signal(LEAVE)

    def messages(self) -> Iterator[dict[str, object]]:
        """What it said since, of its epoch or of none; what it said of another one is past."""
        for message in self._status.read():
            if message.get("epoch", self.epoch) != self.epoch:
                continue
            if message.get("status") == "ready":
                self.ready, self.init_info = True, message
            elif message.get("status") == "loaded":
                self.can_leave = message.get("can_leave") is True
            elif message.get("status") == "left":
                self.ready = False
            yield message

    def describe_exit(self, status: int) -> str:
        """How it ended, and what it said last, if that can be the reason."""
        who = f"{self.name} (pid {self.process.pid})"
        if status == EXIT_WEIGHTS_GONE:
            return f"{who} ended because the weight cache daemon died, whose memory its weights were"
        told = f"{who} {describe_exit(status)}"
        # Killed from outside: whatever it wrote before has nothing to do with it.
        quoted = status not in (0, -signal.SIGKILL, -signal.SIGTERM) and self.stderr.last_error()
        return f"{told}: {quoted}" if quoted else told

    def close(self) -> None:
        self._status.close()
        self._orders.close()
        self.stderr.close()
