"""Continuing a request on another group: the wire messages, and their effect on the scheduler's request.

The base is upstream's retraction path: a request whose delivered tokens already stand in ``output_ids`` is prefilled
over prompt plus output and goes on behind the last token. Retraction keeps the Python object, so everything it holds
besides the tokens (offsets, log-prob lists, grammar, reasoning) is put in place here.
"""

from __future__ import annotations

from array import array
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from sglang.srt.managers import io_struct
from sglang.srt.managers.io_struct import BaseReq, TokenizedGenerateReqInput

from sglang_kevlar.protocol.resume import ResumeState
from sglang_kevlar.protocol.shadow import ShadowTarget
from sglang_kevlar.worker.weights import messages as weights

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

    from sglang_kevlar.worker.scheduler import KevlarScheduler


_FIELDS = TokenizedGenerateReqInput.__struct_fields__
#: one call for all of them: this is done for every request of a lost group
_values = attrgetter(*_FIELDS)


class ResumeError(ValueError):
    """This request cannot be continued; the message says why, for its client."""


class ResumedGenerateReqInput(TokenizedGenerateReqInput, kw_only=True):  # type: ignore[call-arg, misc]
    """A tokenized request with what was already delivered of its answer."""

    # A tail field: the wire format of upstream's structs is positional.
    resume: ResumeState | None = None


class StartedReqOutput(BaseReq, kw_only=True):  # type: ignore[call-arg, misc]
    """Scheduler to frontend: the request ``rid`` is about to run here for the first time.

    Until then it only waits, and is not suspected when the group dies.
    """

    #: tokens of prompt and delivered output of a resumed request that are prefilled again; 0 of a new one
    recomputed_tokens: int


class ShadowPlanReq(BaseReq, kw_only=True):  # type: ignore[call-arg, misc]
    """Frontend to a group, whenever one of these changes: what its KV is of, and who keeps its shadow."""

    #: names the weights that it serves; empty while they change, when nothing is sent or promoted
    content: str
    #: None: nobody
    target: ShadowTarget | None = None


def register_wire_types() -> None:
    """Let upstream's sockets carry the types above, and others of ours. Needed in both end processes; idempotent."""
    io_struct.hook_custom_types(ResumedGenerateReqInput, StartedReqOutput, ShadowPlanReq, *weights.TYPES)


def as_resumed(tokenized: TokenizedGenerateReqInput, resume: ResumeState) -> ResumedGenerateReqInput:
    """``tokenized`` with ``resume``. A shallow copy: the input stays as it is, for the next redirect."""
    return ResumedGenerateReqInput(**dict(zip(_FIELDS, _values(tokenized), strict=True)), resume=resume)


def why_not_resumable(tokenized: TokenizedGenerateReqInput) -> str | None:
    """The reason why a request cannot go on behind its first token elsewhere, or None. Needs no scheduler."""
    if tokenized.session_params is not None:
        return "it belongs to a session, whose state was in the lost group"
    if tokenized.input_embeds is not None:
        return "input embeddings cannot be combined with generated tokens in one prefill"
    if tokenized.positional_embed_overrides is not None:
        return "embedding overrides are not carried over"
    if tokenized.mm_inputs is not None:
        return "multimodal features are consumed by the group that first received them"
    if (getattr(tokenized.sampling_params, "beam_width", None) or 1) > 1:
        return "beam search keeps unsent hypotheses in the scheduler"
    if tokenized.return_hidden_states is True:
        return "hidden states of the delivered tokens were in the lost group"
    return None


def apply_resume(req: Req, resume: ResumeState, scheduler: KevlarScheduler) -> None:
    """Put ``req``, new and about to enter the waiting queue, into the state it had after ``resume.output_ids``.

    Its grammar must be compiled. Raises ResumeError and leaves ``req`` fit for ``set_finish_with_abort`` only.
    """
    output_ids = array("q", resume.output_ids)
    _check(req, output_ids, resume, scheduler)
    req.output_ids = output_ids
    if _is_complete(req):
        raise ResumeError("the delivered tokens already end the request")
    req.kevlar_resumed_context = len(req.origin_input_ids) + len(output_ids)
    # May take the last ones away again, to be decoded once more. All that follows is of those it leaves.
    scheduler.begin_forced_decode(req)
    _replay_grammar(req, req.output_ids)
    # A resumed request counts as retracted: prefix hits are not counted as cached a second time (usage stays as it
    # was reported), and multimodal positions, scheduling statistics etc. follow upstream's own path.
    req.is_retracted = True
    req.retracted_stain = True
    req.cached_tokens = resume.cached_tokens
    req.cached_tokens_device = resume.cached_tokens

    # Only new ids are sent. send_decode_id_offset stays 0: the detokenizer of this group has not seen the request,
    # and emits its text from the start.
    req.send_token_offset = len(output_ids)
    if req.return_logprob:
        _skip_delivered_logprobs(req, len(output_ids))
    scheduler.batch_result_processor._maybe_update_reasoning_tokens(req, list(req.output_ids))


def undo_resume(req: Req) -> None:
    """Make ``req`` a fresh request again, so that an abort of it takes upstream's usual path."""
    req.output_ids = array("q")
    for name in ("kevlar_delivered", "kevlar_resumed_context"):
        req.__dict__.pop(name, None)
    req.finished_reason = None
    req.finished_len = None
    req.is_retracted = False
    req.retracted_stain = False
    req.send_token_offset = 0


def _check(req: Req, output_ids: array[int], resume: ResumeState, scheduler: KevlarScheduler) -> None:
    delivered = len(output_ids)
    if delivered == 0:
        raise ResumeError("nothing was delivered")
    if scheduler.dllm_config is not None:
        raise ResumeError("diffusion language models do not generate token by token")
    if min(output_ids) < 0 or max(output_ids) >= scheduler.model_config.vocab_size:
        raise ResumeError("a delivered token is outside the vocabulary")
    if delivered >= req.sampling_params.max_new_tokens:
        raise ResumeError(
            f"{delivered} tokens were delivered, but this group allows it max_new_tokens="
            f"{req.sampling_params.max_new_tokens}"
        )
    wants_prompt_logprobs = req.return_logprob and 0 <= req.logprob_start_len < len(req.origin_input_ids)
    if wants_prompt_logprobs and not resume.input_logprobs_sent:
        raise ResumeError("its prompt log-probs were not delivered with its first token")


def _is_complete(req: Req) -> bool:
    """Whether the last delivered token ends the request, by the checks the lost scheduler made after it."""
    # Not update_finish_state, which also rewrites tokens.
    if not req._check_str_based_finish():
        req._check_token_based_finish(req.output_ids[-1:])
    return bool(req.finished())


def _replay_grammar(req: Req, output_ids: array[int]) -> None:
    grammar: Any = req.grammar
    if grammar is None:
        return
    for index, token in enumerate(output_ids):
        # As in decode: what follows the end of the grammar is not constrained.
        if grammar.is_terminated():
            return
        try:
            grammar.accept_token(token)
        except ValueError as error:
            raise ResumeError(f"the grammar does not accept delivered token {index} of {len(output_ids)}") from error


def _skip_delivered_logprobs(req: Req, delivered: int) -> None:
    logprob = req.logprob
    # The streamer slices these lists by absolute positions; what was delivered is never read.
    for name in (
        "output_token_logprobs_val",
        "output_token_logprobs_idx",
        "output_top_logprobs_val",
        "output_top_logprobs_idx",
        "output_token_ids_logprobs_val",
        "output_token_ids_logprobs_idx",
    ):
        setattr(logprob, name, [None] * len(req.output_ids))
    req.send_output_token_logprobs_offset = delivered

    # Prompt log-probs went out with the first token. -1 computes none (any start up to the end of the prompt would ask
    # for those of the delivered tokens too, and fail an assertion upstream) and lets the whole prefix match.
    req.logprob_start_len = -1
    req.input_logprob_sent = True
