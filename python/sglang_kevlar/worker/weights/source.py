"""A rank lets another have its weights, from a thread, while it goes on serving."""

from __future__ import annotations

import logging
import threading
import time

import msgspec
import zmq

from sglang_kevlar.control.weight_layout import digest, pieces
from sglang_kevlar.protocol.weights import Begin, Credit, Failed, FromSource, Offer, Piece, Sent, Taken, ToSource
from sglang_kevlar.worker.weights.memory import PIECE_BYTES, WeightMemory
from sglang_kevlar.worker.weights.sockets import TransferError, close, decode

logger = logging.getLogger(__name__)

#: seconds until the other side must have begun: the ranks of a pipeline hear of it one after the other
BEGIN_TIMEOUT = 60.0
#: seconds in which it must say something, once it has
SILENCE = 10.0
#: milliseconds between two looks at whether it is to end
_TICK = 50

_decoder = msgspec.msgpack.Decoder(ToSource)


class WeightSource:
    """For one transfer. `stop` is called by the thread that may change the weights."""

    def __init__(self, memory: WeightMemory, socket: zmq.Socket[bytes], endpoint: str, ticket: str) -> None:
        self.endpoint = endpoint
        self._memory = memory
        self._socket = socket
        self._ticket = ticket
        #: held while the weights are read
        self._reading = threading.Lock()
        self._stopped: TransferError | None = None
        #: whom it sends to
        self._peer: bytes | None = None
        self._thread = threading.Thread(target=self._run, name="weights", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, reason: str, busy: bool = False) -> None:
        """From its return on the weights are not read any more. Waits for one piece at most. ``busy``: see `Failed`."""
        with self._reading:
            if self._stopped is None:
                self._stopped = TransferError(reason, busy)

    def join(self) -> None:
        self._thread.join()

    def _run(self) -> None:
        try:
            self._serve()
        except TransferError as error:
            logger.warning("weights were not handed over: %s", error)
            self._say(Failed(str(error), error.busy))
        except Exception:
            logger.exception("weights were not handed over")
            self._say(Failed("an internal error there; its log says which"))
        finally:
            self.stop("the transfer is over")
            close(self._socket, self.endpoint)

    def _serve(self) -> None:
        while not isinstance(self._hear(BEGIN_TIMEOUT), Begin):
            pass
        self._say(Offer(self._memory.layout))
        sum_ = digest(self._memory.layout)
        credit = 0
        for number, piece in enumerate(pieces(self._memory.layout, PIECE_BYTES)):
            while credit == 0:
                credit += self._credit()
            with self._reading:
                self._check()
                # A copy: the message is read later, by ZMQ's thread.
                data = self._memory.read(piece).copy()
            credit -= 1
            sum_.update(data)
            self._say(Piece(number), data.data)
        self._check()
        self._say(Sent(sum_.digest()))
        # By now they may change.
        while not isinstance(self._hear(SILENCE, stoppable=False), Taken):
            pass  # credit that was not needed

    def _credit(self) -> int:
        message = self._hear(SILENCE)
        if isinstance(message, Taken):
            raise TransferError("the other rank gave up")
        return message.pieces if isinstance(message, Credit) and message.pieces > 0 else 0

    def _hear(self, patience: float, stoppable: bool = True) -> ToSource:
        """The next message of the one that has the ticket."""
        deadline = time.monotonic() + patience
        while True:
            if stoppable:
                self._check()
            if not self._socket.poll(_TICK):
                if time.monotonic() > deadline:
                    raise TransferError(f"the other rank said nothing for {max(patience, 0):.0f} s")
                continue
            sender, *frames = self._socket.recv_multipart()
            if len(frames) != 1 or (self._peer is not None and sender != self._peer):
                continue
            message = decode(frames[0], _decoder)
            if self._peer is None:
                if not isinstance(message, Begin) or message.ticket != self._ticket:
                    self._socket.send_multipart([sender, msgspec.msgpack.encode(Failed("there is no such transfer"))])
                    continue
                self._peer = sender
            return message

    def _check(self) -> None:
        if self._stopped is not None:
            raise self._stopped

    def _say(self, message: FromSource, data: memoryview | None = None) -> None:
        if self._peer is None:
            return
        frames: list[bytes | memoryview] = [self._peer, msgspec.msgpack.encode(message)]
        if data is not None:
            frames.append(data)
        self._socket.send_multipart(frames, zmq.NOBLOCK, copy=data is None)
