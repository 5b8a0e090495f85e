"""What travels with a request that is continued on another group (the journal's side of a resume)."""

from __future__ import annotations

from array import array

import msgspec

#: how the wire id of a request ends that a group had accepted before this one
MOVED = "+;"


class ResumeState(msgspec.Struct, frozen=True, kw_only=True):
    """State of a request at the moment of a redirect. Only sent when at least one token was delivered."""

    #: every token delivered so far ("q"); generation continues behind the last one. Not a list: that takes 30 times
    #: as long to send. Without its parameter, which array does not take before Python 3.12.
    output_ids: array  # type: ignore[type-arg]
    #: usage as already reported; a resume does not count its recomputation as cached or uncached
    cached_tokens: int = 0
    #: prompt log-probs were delivered with the first token and must not be computed or sent again
    input_logprobs_sent: bool = False
