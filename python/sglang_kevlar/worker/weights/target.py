"""A rank takes the weights of the same rank of another group into its own memory."""

from __future__ import annotations

import contextlib
import time

import msgspec
import zmq
from zmq.utils.monitor import recv_monitor_message

from sglang_kevlar.control.weight_layout import difference, digest, pieces, size
from sglang_kevlar.protocol.weights import Begin, Credit, Failed, FromSource, Offer, Piece, Sent, Taken, ToSource
from sglang_kevlar.shadow.sockets import Network
from sglang_kevlar.transport import TransportError
from sglang_kevlar.worker.weights import source
from sglang_kevlar.worker.weights.memory import PIECE_BYTES, WeightMemory
from sglang_kevlar.worker.weights.sockets import TransferError, decode

#: pieces that may be on their way
DEPTH = 4

_decoder = msgspec.msgpack.Decoder(FromSource)


class WeightTarget:
    """One transfer. The weights must not be used meanwhile, nor after one that failed."""

    def __init__(self, memory: WeightMemory, network: Network, endpoint: str, ticket: str, timeout: float) -> None:
        self._memory = memory
        self._network = network
        self._endpoint = endpoint
        self._ticket = ticket
        self._deadline = time.monotonic() + timeout

    def fetch(self) -> int:
        """How many bytes were taken. Raises TransferError."""
        try:
            self._socket = self._network.dial(self._endpoint)
        except TransportError as error:
            raise TransferError(str(error)) from None
        monitor = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._poller = zmq.Poller()
        for socket in (self._socket, monitor):
            self._poller.register(socket, zmq.POLLIN)
        self._monitor = monitor
        try:
            try:
                taken = self._fetch()
            finally:
                with contextlib.suppress(TransferError):
                    self._say(Taken())
            return taken
        finally:
            self._socket.disable_monitor()
            self._monitor.close(linger=0)
            # Long enough for the last word; if that is lost, the other side waits in vain for it, and ends.
            self._socket.close(linger=1000)

    def _fetch(self) -> int:
        layout = self._memory.layout
        self._say(Begin(self._ticket))
        # The ranks of a pipeline hear of it one after the other.
        message, _ = self._hear(source.BEGIN_TIMEOUT)
        if not isinstance(message, Offer):
            raise TransferError(f"{type(message).__name__} came before the layout")
        if (reason := difference(message.layout, layout)) is not None:
            raise TransferError(f"its weights do not fit: {reason}")
        sum_ = digest(layout)
        self._say(Credit(DEPTH))
        for number, piece in enumerate(pieces(layout, PIECE_BYTES)):
            message, data = self._hear(source.SILENCE)
            length = piece.end - piece.start
            if not isinstance(message, Piece) or message.number != number or data is None or len(data) != length:
                raise TransferError(f"piece {number} is not what came")
            self._memory.write(piece, data)
            self._say(Credit(1))
            # Of what is there now, not of what came.
            sum_.update(self._memory.read(piece))
        message, _ = self._hear(source.SILENCE)
        if not isinstance(message, Sent):
            raise TransferError(f"{type(message).__name__} came after the last piece")
        if message.digest != sum_.digest():
            raise TransferError("the digests differ: what arrived is not what was sent")
        return size(layout)

    def _hear(self, patience: float) -> tuple[FromSource, memoryview | None]:
        until = min(self._deadline, time.monotonic() + patience)
        lost = False
        while True:
            ready = dict(self._poller.poll(0 if lost else max(0, int((until - time.monotonic()) * 1000))))
            if self._socket in ready:
                message, *data = self._socket.recv_multipart(copy=False)
                said = decode(message.buffer, _decoder)
                if isinstance(said, Failed):
                    raise TransferError(said.reason, said.busy)
                return said, data[0].buffer if data else None
            if self._monitor in ready:
                recv_monitor_message(self._monitor)
                lost = True
                continue  # what it sent before may still be there
            if lost:
                raise TransferError("the connection was lost, or the rank there died")
            if time.monotonic() >= until:
                late = "it took too long" if until == self._deadline else f"it said nothing for {patience:.0f} s"
                raise TransferError(late)

    def _say(self, message: ToSource) -> None:
        """Never waits: without a connection, ZMQ would for ever. Raises TransferError."""
        try:
            self._socket.send(msgspec.msgpack.encode(message), zmq.NOBLOCK)
        except zmq.Again:
            raise TransferError("there is no connection to the rank there") from None
