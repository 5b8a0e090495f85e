"""The heartbeat page: one small file per process and epoch, mapped by its writer and by the frontend.

Writing is a few stores into shared memory, so the scheduler loop can afford it at every step. Readers use the
sequence number twice (odd while a write is in progress) and retry; a torn read is never judged.

Times are CLOCK_MONOTONIC nanoseconds: a stepped wall clock changes nothing, and the clock is one for all
processes of a host.
"""

from __future__ import annotations

import struct
from enum import IntEnum

import msgspec

PAGE_SIZE = 4096
MAGIC = 0x4B45564C
#: magic, sequence, phase, batch tokens, phase start ns, beat ns, steps
LAYOUT = struct.Struct("<IIIIQQQ")


class Phase(IntEnum):
    STARTING = 0  # imports, weights, graph capture: bounded by start_timeout only
    IDLE = 1  # a scheduler's loop turns and finds nothing to do: a beat every turn, with at most a second's sleep
    FORWARD = 2  # run_batch until its result is processed; `tokens` is the size of the batch
    CONTROL = 3  # a control request (weight update, flush, LoRA load): no deadline but control_timeout
    DETOKENIZE = 4
    WAITING = 5  # until another process sends something: no deadline


class Heartbeat(msgspec.Struct, frozen=True):
    phase: Phase
    tokens: int
    phase_start_ns: int
    beat_ns: int
    steps: int

    @property
    def since_ns(self) -> int:
        """When what it does now began: idling begins anew at every turn of the loop."""
        return self.beat_ns if self.phase is Phase.IDLE else self.phase_start_ns


def pack(sequence: int, beat: Heartbeat) -> bytes:
    return LAYOUT.pack(
        MAGIC, sequence, beat.phase, min(beat.tokens, 2**32 - 1), beat.phase_start_ns, beat.beat_ns, beat.steps
    )


def unpack(data: bytes) -> tuple[int, Heartbeat] | None:
    """``(sequence, heartbeat)``, or None when the page was never written or is not ours."""
    magic, sequence, phase, tokens, start, beat, steps = LAYOUT.unpack_from(data)
    if magic != MAGIC or phase not in Phase._value2member_map_:
        return None
    return sequence, Heartbeat(Phase(phase), tokens, start, beat, steps)
