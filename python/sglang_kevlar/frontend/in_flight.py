"""A request as the frontend holds it: what to send, to whom it belongs, and the text its client already has."""

from __future__ import annotations

import copy
from array import array
from dataclasses import dataclass
from typing import TypeAlias

from sglang.srt.managers.io_struct import TokenizedEmbeddingReqInput, TokenizedGenerateReqInput

from sglang_kevlar.control.journal import Attempt, Entry
from sglang_kevlar.control.routing import block_hashes
from sglang_kevlar.frontend.outcome import RequestOutcome
from sglang_kevlar.worker.resume import as_resumed, why_not_resumable

TokenizedRequest: TypeAlias = TokenizedGenerateReqInput | TokenizedEmbeddingReqInput


class TextMismatch(Exception):
    """The group that resumed a request made other text of the same tokens: nothing more can be sent exactly."""


@dataclass(slots=True, eq=False)
class Call:
    """What is made with the same weights: a request, or all of a batch or of n > 1."""

    #: name of the weights, once a request of it was submitted
    weights: str | None = None
    #: a request of it was given to a group
    begun: bool = False
    #: its weights are no longer served: nothing more of it is
    refused: bool = False


class InFlight:
    """One request between `Failover.submit` and its end."""

    def __init__(
        self, entry: Entry, message: TokenizedRequest, outcome: RequestOutcome | None, journal_interval: int
    ) -> None:
        self.entry = entry
        self.outcome = outcome
        self.call: Call | None = None
        self.abort_requested = False
        #: after a redirect: the group that has the shadow of its KV
        self.heir: int | None = None
        #: its last output was received; its client may already use its id again
        self.ended = False
        #: since when its client waits for the next token (monotonic); None: not to be measured
        self.waits_since: float | None = None
        #: tokens the group that continues it computed again
        self.recomputed_now = 0
        self._message = _journalled(message, journal_interval, entry.not_continuable is None)
        self._blocks: array[int] | None = None
        #: text the resuming group has sent again so far; None when it is past what was delivered
        self._replayed: str | None = None

    @property
    def blocks(self) -> array[int]:
        """Of its prompt, for the router. Kept: to hash a long prompt takes longer than to send it."""
        if self._blocks is None:
            message = self._message
            # What keeps radix trees apart besides the tokens.
            parts = [message.lora_id, getattr(message, "extra_key", None), getattr(message, "cache_salt", None)]
            namespace = "\0".join(part or "" for part in parts)
            self._blocks = block_hashes(message.input_ids or array("q"), namespace)
        return self._blocks

    @property
    def replaying(self) -> bool:
        """Whether `new_text` compares what comes with what was delivered."""
        return self._replayed is not None

    def for_attempt(self, attempt: Attempt) -> TokenizedRequest:
        """The message to send for ``attempt``; the kept one stays as it is, for the next."""
        resume = self.entry.resume_state()
        self._replayed = "" if resume is not None else None
        self.recomputed_now = 0
        message = copy.copy(self._message)
        message.rid = attempt.wire_rid
        return message if resume is None else as_resumed(message, resume)

    def new_text(self, text: str, delivered: str) -> str:
        """What of ``text`` the client does not have yet.

        A detokenizer that meets a resumed request starts from its first token, so the text comes again; how much of
        it at once depends on incomplete characters. Raises TextMismatch when it is not what was delivered.
        """
        if self._replayed is None:
            return text
        self._replayed += text
        if len(self._replayed) < len(delivered):
            if not delivered.startswith(self._replayed):
                raise TextMismatch
            return ""
        if not self._replayed.startswith(delivered):
            raise TextMismatch
        rest = self._replayed[len(delivered) :]
        self._replayed = None
        return rest


def _journalled(message: TokenizedRequest, interval: int, continuable: bool) -> TokenizedRequest:
    """The message as groups get it: a request reports its tokens as it goes, also when its client does not stream.

    Upstream reports such a request every 50 tokens, and then without holding back what may become a stop string. As
    a stream it does, so what is journalled is always text that stays. A request that cannot be continued reports
    nothing before its end (`worker.rank` turns upstream's interval off): its client has seen nothing, so it is simply
    run again.
    """
    message = copy.copy(message)
    if isinstance(message, TokenizedGenerateReqInput) and not message.stream and continuable:
        message.stream = True
        message.sampling_params = copy.copy(message.sampling_params)
        message.sampling_params.stream_interval = interval
    return message


def not_continuable(message: TokenizedRequest) -> str | None:
    """Why a request cannot go on elsewhere after its first token, as half a sentence; None when it can.

    docs/limits.md lists these with their reasons.
    """
    if not isinstance(message, TokenizedGenerateReqInput):
        return None
    return why_not_resumable(message)
