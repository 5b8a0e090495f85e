"""Requests to, and outputs from, one incarnation of one group. Closing its channel is the fence."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
import time
from typing import Any

import zmq
import zmq.asyncio
from sglang.srt.managers import io_struct

from sglang_kevlar.control.shadow_partners import Place
from sglang_kevlar.protocol.launch import Paths

#: messages a group may leave unread before it counts as unable to take more
SEND_HWM = 65_536
#: seconds a ready group may take to connect to us (it retries every 100 ms)
CONNECT_TIMEOUT = 10.0
CONNECT_POLL = 0.02


class ChannelFull(Exception):
    """The group does not read its input; the message was not sent."""


class CannotSend(Exception):
    """This message cannot go to a group on another host; the text says why."""


class Channel:
    """To and from ``(group, epoch)``, and what the actor notes of it."""

    #: its processes are on another host, or might be: it is reached over a session
    remote = False

    def __init__(self, group: int, epoch: int, capacity: int, place: Place) -> None:
        self.group = group
        self.epoch = epoch
        #: KV tokens the group can hold
        self.capacity = capacity
        self.place = place
        #: the group has the weights and adapters of the others and may serve
        self.up_to_date = False
        #: name of its weights (`frontend.replay`); empty while they change
        self.weights = ""
        #: it is being emptied to get other weights: no new requests (`frontend.rolling_weights`)
        self.taken = False
        #: it is about to be fenced
        self.given_up = False
        #: the group that had its shadow when it was given up
        self.heir: int | None = None
        #: something is wrong with it that is not yet proven
        self.suspect = False
        #: messages handled so far
        self.received = 0
        self.closed = False

    async def connected(self) -> bool:
        """Whether the group can be sent to, waiting for that for a bounded time."""
        raise NotImplementedError

    def send(self, message: Any) -> None:
        """Raises ChannelFull when the group does not read, CannotSend. After `close` nothing is sent."""
        raise NotImplementedError

    def tells_plans(self) -> bool:
        """Whether this frontend is the one that tells the group who keeps its shadow."""
        return True

    def refusal(self, message: Any) -> str | None:
        """Why the group cannot be asked for this, or None. To be asked before a control request goes to any."""
        return None

    async def arrival(self) -> None:
        """Wait for a message. It stays in the channel, where `drain` finds it too: nothing overtakes it."""
        raise NotImplementedError

    def take(self) -> Any:
        """The message that `arrival` waited for."""
        raise NotImplementedError

    def drain(self) -> list[Any]:
        """What has already arrived: tokens that were made before the group died are not made again."""
        raise NotImplementedError

    def close(self) -> None:
        """The fence: nothing of this incarnation arrives any more."""
        raise NotImplementedError


class GroupChannel(Channel):
    """A group of this host. Upstream's scheduler and detokenizer connect to these names, so we bind them.

    Nothing of another epoch can arrive here: it would have to know this epoch's file names.
    """

    def __init__(
        self, context: zmq.asyncio.Context, paths: Paths, group: int, epoch: int, capacity: int, place: Place
    ) -> None:
        super().__init__(group, epoch, capacity, place)
        #: the message being waited for; once it is there it stays here until it is taken
        self._next: asyncio.Future[bytes] | None = None
        self._files = [paths.channel(group, epoch, name) for name in ("tokenizer", "scheduler")]
        self._outputs = context.socket(zmq.PULL)
        self._outputs.setsockopt(zmq.RCVHWM, 0)
        self._outputs.bind(self._files[0])
        # A plain socket: sending must not yield to the event loop in the middle of a decision.
        self._requests = zmq.Socket(context, zmq.PUSH)
        self._requests.setsockopt(zmq.SNDHWM, SEND_HWM)
        self._requests.setsockopt(zmq.LINGER, 0)
        self._requests.bind(self._files[1])

    async def connected(self) -> bool:
        # Not zmq's poller: closed meanwhile, it goes on watching the number of a file that may be another's by then.
        deadline = time.monotonic() + CONNECT_TIMEOUT
        while not self.closed and not self._requests.poll(0, zmq.POLLOUT):
            if time.monotonic() > deadline:
                return False
            await asyncio.sleep(CONNECT_POLL)
        return not self.closed

    def send(self, message: Any) -> None:
        if self.closed:
            return
        try:
            io_struct.sock_send(self._requests, message, zmq.NOBLOCK)
        except zmq.Again:
            raise ChannelFull(f"worker group {self.group} (epoch {self.epoch}) does not read its input") from None

    async def arrival(self) -> None:
        if self._next is None:
            # Not upstream's async_sock_recv: its recv_pyobj logs an exception when the socket is closed meanwhile.
            self._next = asyncio.ensure_future(self._outputs.recv())
        await self._next

    def take(self) -> Any:
        assert self._next is not None
        data, self._next = self._next.result(), None
        return pickle.loads(data) if io_struct._USE_PICKLE_IPC else io_struct.msgpack_decode(data)

    def drain(self) -> list[Any]:
        waits = self._next is not None and self._next.done() and not self._next.cancelled()
        arrived: list[Any] = [self.take()] if waits else []
        raw: zmq.Socket[bytes] = zmq.Socket.shadow(self._outputs.underlying)
        with contextlib.suppress(zmq.Again):
            while True:
                arrived.append(io_struct.sock_recv(raw, zmq.NOBLOCK))
        return arrived

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        self._outputs.close(linger=0)
        self._requests.close(linger=0)
        for endpoint in self._files:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(endpoint.removeprefix("ipc://"))
