"""Waiting for the first worker group, before there is an event loop."""

from __future__ import annotations

import contextlib
import logging
import os
from typing import Any

import msgspec
import zmq

from sglang_kevlar.protocol.group import GroupReport
from sglang_kevlar.protocol.launch import Paths

logger = logging.getLogger(__name__)


def wait_for_first_group(paths: Paths) -> dict[str, Any]:
    """The ready info of the first group that reports ready, with its phase changes logged meanwhile.

    Waits as long as it takes: a group that does not start is the launcher's to judge, and it ends us too.
    """
    decoder = msgspec.msgpack.Decoder(GroupReport)
    context = zmq.Context()
    said: dict[int, tuple[int, str]] = {}
    try:
        socket = context.socket(zmq.ROUTER)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(paths.control.removeprefix("ipc://"))
        socket.bind(paths.control)
        while True:
            try:
                report = decoder.decode(socket.recv_multipart()[-1])
            except msgspec.DecodeError as error:
                logger.warning("ignored a malformed group report: %s", error)
                continue
            if said.get(report.group) != (report.epoch, report.phase):
                said[report.group] = (report.epoch, report.phase)
                cause = f": {report.cause}" if report.cause and report.phase == "down" else ""
                logger.info("worker group %d (epoch %d): %s%s", report.group, report.epoch, report.phase, cause)
            if report.phase == "ready" and report.init_info is not None:
                return report.init_info
    finally:
        context.destroy(linger=0)
