"""What travels with a request that is continued on another group (the journal's side of a resume)."""

from __future__ import annotations

import msgspec

#: how the wire id of a request ends that a group had accepted before this one
MOVED = "+;"


class ResumeState(msgspec.Struct, frozen=True, kw_only=True):
    """State of a request at the moment of a redirect. Only sent when at least one token was delivered."""

    #: every token delivered so far; generation continues behind the last one
    output_ids: list[int]
    #: usage as already reported; a resume does not count its recomputation as cached or uncached
    cached_tokens: int = 0
    #: prompt log-probs were delivered with the first token and must not be computed or sent again
    input_logprobs_sent: bool = False
