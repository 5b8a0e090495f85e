"""A rank's part in handing weights from one group to another, as the scheduler calls it, on its thread.

Nothing here waits: bytes move in a thread, and the answer is asked for at every turn. Each rank states how it went in
a file, for no rank may wait for another inside a request: a later stage of a pipeline has not seen it yet.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec
from sglang.srt.constants import GPU_MEMORY_TYPE_WEIGHTS
from sglang.srt.runtime_context import get_model

from sglang_kevlar.cluster import keys
from sglang_kevlar.protocol.launch import LaunchPlan, Paths
from sglang_kevlar.protocol.weights import RankStatement
from sglang_kevlar.shadow.sockets import Network
from sglang_kevlar.transport import TransportError
from sglang_kevlar.worker.weights.memory import NoPlainMemory, WeightMemory
from sglang_kevlar.worker.weights.messages import (
    WRITERS,
    FetchWeightsReq,
    FetchWeightsReqOutput,
    ServeWeightsReq,
    ServeWeightsReqOutput,
)
from sglang_kevlar.worker.weights.sockets import TransferError, listen
from sglang_kevlar.worker.weights.source import WeightSource
from sglang_kevlar.worker.weights.target import WeightTarget

if TYPE_CHECKING:
    from sglang.srt.managers.scheduler import Scheduler

logger = logging.getLogger(__name__)

#: seconds in which all ranks must have said where their weights are to be had
OFFER_TIMEOUT = 30.0
#: seconds for the statements of the others after the deadline of what they do
GRACE = 5.0
#: seconds between two looks for them
_INTERVAL = 0.02
_CHANGING = "its weights are just being changed"


class RankWeights:
    def __init__(self, scheduler: Scheduler, plan: LaunchPlan, paths: Paths, group: int, epoch: int, rank: int) -> None:
        self._updater = scheduler.weight_updater
        self._flush: Callable[[], bool] = scheduler.flush_cache
        self._plan, self._paths = plan, paths
        self._group, self._epoch, self._rank = group, epoch, rank
        self._network: Network | None = None
        self._source: WeightSource | None = None
        self._fetching: _Fetch | None = None
        #: of the first rank: what is to be answered when all have made their statement, and until when
        self._asked: tuple[ServeWeightsReq | FetchWeightsReq, float] | None = None
        self._look_at = 0.0
        #: the requests of this turn change the weights
        self._changing = False

    # ---- in the scheduler's loop ---------------------------------------------------------------------------------

    def stop(self) -> None:
        """The epoch is over. A transfer to this rank ends by itself, into memory that nobody uses any more."""
        self._stop_serving("its group is lost")
        if self._network is not None:
            # It waits for the last words of its sockets.
            threading.Thread(target=self._network.close, name="weights-end", daemon=True).start()

    def before(self, requests: list[Any]) -> None:
        """They are about to be acted on, in this order: whoever reads the weights stops if one changes them."""
        self._changing = any(isinstance(request, WRITERS) for request in requests)
        if self._changing:
            self._stop_serving(_CHANGING, busy=True)

    def serve(self, request: ServeWeightsReq) -> None:
        self._stop_serving("another transfer has begun")
        statement = RankStatement(request.ticket)
        try:
            self._check_servable()
            # Another name each time: ZMQ may remove the file of a socket after the next one is bound.
            name = f"weights{self._rank}.{request.ticket[:8]}"
            address = self._paths.channel(self._group, self._epoch, name)
            if request.network:
                if self._plan.kevlar.advertise is None:
                    raise TransferError("without --advertise it has no address for ranks of other hosts")
                address = self._plan.kevlar.advertise
            memory = self._memory()
            socket, endpoint = listen(self._network_of_rank(), address)
            self._source = WeightSource(memory, socket, endpoint, request.ticket)
            self._source.start()
            statement = RankStatement(request.ticket, endpoint=endpoint)
        except (TransferError, TransportError, NoPlainMemory, keys.KeyProblem) as error:
            busy = isinstance(error, TransferError) and error.busy
            statement = RankStatement(request.ticket, reason=str(error), busy=busy)
        self._state(statement)
        self._expect(request, OFFER_TIMEOUT)

    def fetch(self, request: FetchWeightsReq) -> None:
        self._stop_serving("its own are being replaced")
        self._expect(request, request.timeout + GRACE)
        if self._fetching is not None:
            self._state(RankStatement(request.ticket, reason="it is still at another transfer", busy=True))
            return
        try:
            if get_model().weight_cache_mode != "off":
                raise TransferError("its weights are those of a weight cache daemon, which others map, too")
            if self._rank >= len(request.endpoints):
                raise TransferError(f"the other group has {len(request.endpoints)} ranks")
            endpoint = request.endpoints[self._rank]
            network = self._network_of_rank()
            target = WeightTarget(self._memory(), network, endpoint, request.ticket, request.timeout)
            self._fetching = _Fetch(target, request.ticket)
        except (TransferError, NoPlainMemory, keys.KeyProblem) as error:
            self._state(RankStatement(request.ticket, reason=str(error)))

    def turn(self) -> ServeWeightsReqOutput | FetchWeightsReqOutput | None:
        """At every turn of the loop: an answer that is due, of the first rank."""
        if self._fetching is not None and self._fetching.statement is not None:
            statement, self._fetching = self._fetching.statement, None
            # KV that was made before, with other weights.
            if not statement.reason and not self._flush():
                statement = RankStatement(statement.ticket, reason="it still ran requests", busy=True)
            self._state(statement)
        now = time.monotonic()
        if self._asked is None or now < self._look_at:
            return None
        self._look_at = now + _INTERVAL
        request, deadline = self._asked
        said = [self._statement_of(rank, request.ticket) for rank in range(self._plan.tp_size * self._plan.pp_size)]
        known = [statement for statement in said if statement is not None]
        if len(known) < len(said) and now < deadline:
            return None
        self._asked = None
        silent = [f"rank {rank} said nothing" for rank, statement in enumerate(said) if statement is None]
        failed = [f"rank {rank}: {one.reason}" for rank, one in enumerate(said) if one is not None and one.reason]
        ok = {
            "ticket": request.ticket,
            "success": not failed and not silent,
            "message": "; ".join([*failed, *silent])[:1000],
            # Of a pair, one may only have failed because the other did.
            "busy": any(one.busy for one in known),
        }
        if isinstance(request, ServeWeightsReq):
            return ServeWeightsReqOutput(**ok, endpoints=[one.endpoint for one in known])
        return FetchWeightsReqOutput(**ok, bytes=sum(one.bytes for one in known))

    # ---- its own part --------------------------------------------------------------------------------------------

    def _check_servable(self) -> None:
        """Raises TransferError."""
        if self._changing:
            raise TransferError(_CHANGING, busy=True)
        if self._updater._session is not None:
            raise TransferError("an update of its weights is open (begin_weight_update)", busy=True)
        if GPU_MEMORY_TYPE_WEIGHTS in self._updater.offload_tags:
            raise TransferError("its weights are released (release_memory_occupation)")
        if self._fetching is not None:
            raise TransferError("it is taking over others")

    def _memory(self) -> WeightMemory:
        return WeightMemory({role: runner.model for role, runner in self._updater._select_runners()})

    def _network_of_rank(self) -> Network:
        if self._network is None:
            self._network = Network(keys.load(self._plan.kevlar.cluster_key_file))
        return self._network

    def _stop_serving(self, reason: str, busy: bool = False) -> None:
        if self._source is not None:
            self._source.stop(reason, busy)
            self._source = None

    # ---- all ranks -----------------------------------------------------------------------------------------------

    def _expect(self, request: ServeWeightsReq | FetchWeightsReq, timeout: float) -> None:
        if self._rank == 0:
            self._asked = request, time.monotonic() + timeout

    def _state(self, statement: RankStatement) -> None:
        path = self._paths.weights(self._group, self._epoch, self._rank)
        with open(f"{path}.new", "wb") as file:
            file.write(msgspec.msgpack.encode(statement))
        os.replace(f"{path}.new", path)

    def _statement_of(self, rank: int, ticket: str) -> RankStatement | None:
        try:
            with open(self._paths.weights(self._group, self._epoch, rank), "rb") as file:
                statement = msgspec.msgpack.decode(file.read(), type=RankStatement)
        except FileNotFoundError:
            return None
        return statement if statement.ticket == ticket else None


class _Fetch:
    """A transfer in its thread."""

    def __init__(self, target: WeightTarget, ticket: str) -> None:
        self._target = target
        self._ticket = ticket
        #: how it went, once it is over
        self.statement: RankStatement | None = None
        threading.Thread(target=self._run, name="weights", daemon=True).start()

    def _run(self) -> None:
        try:
            self.statement = RankStatement(self._ticket, bytes=self._target.fetch())
        except TransferError as error:
            self.statement = RankStatement(self._ticket, reason=str(error), busy=error.busy)
        except Exception as error:
            logger.exception("weights were not taken over")
            self.statement = RankStatement(self._ticket, reason=f"{type(error).__name__}: {error}"[:300])
