"""The sockets of one incarnation: order of what arrives, waiting for a connection, the end of both."""

from __future__ import annotations

import asyncio
import tempfile
from types import SimpleNamespace

import pytest
import zmq
import zmq.asyncio

from frontend_fakes import AbortReq
from sglang_kevlar.control.shadow_partners import Place
from sglang_kevlar.frontend import channels
from sglang_kevlar.frontend.channels import GroupChannel
from sglang_kevlar.protocol.launch import Paths


def test_a_channel_keeps_a_message_until_it_is_taken_and_drains_it_first():
    async def main() -> None:
        context = zmq.asyncio.Context()
        with tempfile.TemporaryDirectory() as directory:
            paths = Paths(directory)
            channel = GroupChannel(context, paths, 0, 1, 10, Place("0"))
            group = zmq.Context().socket(zmq.PUSH)
            group.connect(paths.channel(0, 1, "tokenizer"))
            for number in range(3):
                channels.io_struct.sock_send(group, AbortReq(rid=str(number)))
            await channel.arrival()
            await channel.arrival()
            assert channel.take().rid == "0"
            await channel.arrival()
            await asyncio.sleep(0.2)
            assert [message.rid for message in channel.drain()] == ["1", "2"]
            waits = asyncio.ensure_future(channel.arrival())
            await asyncio.sleep(0.05)
            channel.close()
            with pytest.raises(asyncio.CancelledError):
                await waits
            channel.send(AbortReq(rid="x"))
            group.close(linger=0)

    asyncio.run(main())


def test_waiting_for_a_connection_ends_with_the_channel():
    async def main() -> None:
        context = zmq.asyncio.Context()
        with tempfile.TemporaryDirectory() as directory:
            paths = Paths(directory)
            channel = GroupChannel(context, paths, 0, 1, 10, Place("0"))
            waits = asyncio.ensure_future(channel.connected())
            await asyncio.sleep(0.1)
            channel.close()
            assert await asyncio.wait_for(waits, 5) is False
            channel = GroupChannel(context, paths, 0, 2, 10, Place("0"))
            group = zmq.Context().socket(zmq.PULL)
            group.connect(paths.channel(0, 2, "scheduler"))
            assert await channel.connected()
            channel.close()
            group.close(linger=0)

    asyncio.run(main())


def test_a_group_that_never_connects(monkeypatch):
    monkeypatch.setattr(channels, "CONNECT_TIMEOUT", 0.1)

    async def main() -> None:
        with tempfile.TemporaryDirectory() as directory:
            channel = GroupChannel(zmq.asyncio.Context(), Paths(directory), 0, 1, 10, Place("0"))
            assert not await channel.connected()
            with pytest.raises(channels.ChannelFull):
                channel.send(SimpleNamespace)
            channel.close()

    monkeypatch.setattr(channels.io_struct, "sock_send", lambda socket, obj, flags: socket.send(b"", flags))
    asyncio.run(main())
