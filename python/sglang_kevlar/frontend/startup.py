"""Waiting for the first worker group, before there is an event loop."""

from __future__ import annotations

import contextlib
import logging
import os
from typing import Any

import msgspec
import zmq

from sglang_kevlar.control.session import Event, Joined, StateChanged
from sglang_kevlar.frontend.sessions import RETRY, listener_of
from sglang_kevlar.protocol.group import GroupReport
from sglang_kevlar.protocol.launch import LaunchPlan, Paths

logger = logging.getLogger(__name__)

#: seconds for which reports of groups of this host may wait while those of others are awaited
POLL = 0.05


class FirstGroup:
    """Looks for a group that is ready, and logs what the groups do meanwhile."""

    def __init__(self) -> None:
        self.init_info: dict[str, Any] | None = None
        self._decoder = msgspec.msgpack.Decoder(GroupReport)
        self._names: dict[str, str] = {}
        self._said: dict[str, tuple[int, str]] = {}

    def on_report(self, frame: bytes) -> None:
        """Of a group of this host."""
        try:
            report = self._decoder.decode(frame)
        except msgspec.DecodeError as error:
            logger.warning("ignored a malformed group report: %s", error)
            return
        self._on_phase(str(report.group), report.epoch, report.phase, report.cause, report.init_info)

    def on_session(self, event: Event) -> None:
        """Of one that joined."""
        if isinstance(event, Joined):
            self._names[event.session] = event.identity.name
        if isinstance(event, Joined | StateChanged):
            state = event.state
            self._on_phase(self._names[event.session], state.epoch, state.phase, state.cause, state.init_info)

    def _on_phase(self, group: str, epoch: int, phase: str, cause: str, init_info: dict[str, Any] | None) -> None:
        if self._said.get(group) != (epoch, phase):
            self._said[group] = (epoch, phase)
            why = f": {cause}" if cause and phase == "down" else ""
            logger.info("worker group %s (epoch %d): %s%s", group, epoch, phase, why)
        if phase == "ready" and init_info is not None:
            self.init_info = init_info


def wait_for_first_group(plan: LaunchPlan, paths: Paths) -> dict[str, Any]:
    """The ready info of the first group that reports ready.

    Waits as long as it takes: a group that does not start is the launcher's to judge, and it ends us too. Sessions end
    with it, for there is nobody yet to keep them; their groups come again.
    """
    first = FirstGroup()
    context = zmq.Context()
    listener = None if plan.kevlar.listen is None else listener_of(plan, first.on_session)
    try:
        socket = context.socket(zmq.ROUTER)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(paths.control.removeprefix("ipc://"))
        socket.bind(paths.control)
        while first.init_info is None:
            if socket.poll(None if listener is None else 0):
                first.on_report(socket.recv_multipart()[-1])
            elif listener is not None:
                listener.poll(POLL)
        return first.init_info
    finally:
        if listener is not None:
            listener.close("the frontend is about to serve", RETRY)
        context.destroy(linger=0)
