"""What KevlarScheduler adds to upstream's: the way of a resume into the waiting queue, and the heartbeat's phases."""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from beats import Beats

from sglang_kevlar.platform import torchvision_shim

torchvision_shim.install()
pytest.importorskip("sglang")

from sglang.srt.managers.io_struct import AbortReq, FlushCacheReqInput  # noqa: E402
from sglang.srt.managers.scheduler import Scheduler  # noqa: E402
from sglang.srt.sampling.sampling_params import SamplingParams  # noqa: E402

from sglang_kevlar.protocol.resume import ResumeState  # noqa: E402
from sglang_kevlar.worker import scheduler as scheduler_module  # noqa: E402
from sglang_kevlar.worker.forced_decode import ForcedDecode  # noqa: E402
from sglang_kevlar.worker.resume import ResumedGenerateReqInput  # noqa: E402
from sglang_kevlar.worker.scheduler import KevlarScheduler  # noqa: E402


class FakeReq(SimpleNamespace):
    """The fields of upstream's Req that a resume reads and writes."""

    def __init__(self, rid: str, **changes: Any) -> None:
        fields = {
            "rid": rid,
            "origin_input_ids": array("q", [1, 2, 3]),
            "output_ids": array("q"),
            "sampling_params": SimpleNamespace(max_new_tokens=10),
            "return_logprob": False,
            "logprob_start_len": -1,
            "grammar": None,
            "to_finish": None,
            "finished_reason": None,
            "finished_len": None,
            "is_retracted": False,
            "retracted_stain": False,
            "send_token_offset": 0,
            "cached_tokens": 0,
        }
        super().__init__(**(fields | changes))

    def finished(self) -> bool:
        return self.finished_reason is not None

    def set_finish_with_abort(self, message: str, **_: Any) -> None:
        self.to_finish = message

    def _check_str_based_finish(self) -> bool:
        return False

    def _check_token_based_finish(self, tokens: Any) -> bool:
        return False


class Grammar:
    """Accepts rising tokens."""

    def __init__(self) -> None:
        self.accepted: list[int] = []

    def is_terminated(self) -> bool:
        return False

    def accept_token(self, token: int) -> None:
        if self.accepted and token < self.accepted[-1]:
            raise ValueError("not accepted")
        self.accepted.append(token)


@pytest.fixture
def scheduler(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A scheduler of which only the waiting queue works."""
    made = KevlarScheduler.__new__(KevlarScheduler)
    made.waiting_queue = []
    made.grammar_manager = SimpleNamespace(grammar_queue=[])
    made.dllm_config = None
    made.model_config = SimpleNamespace(vocab_size=100, dtype=torch.float32)
    made.batch_result_processor = SimpleNamespace(_maybe_update_reasoning_tokens=lambda req, ids: None)
    made._arriving_resume = None
    made.shadow = made.weights = None
    made._forced = ForcedDecode(SimpleNamespace(forward_batch_generation=None))
    made._in_flight = deque(maxlen=2)
    made.sent = []
    made.ipc_channels = SimpleNamespace(
        send_to_tokenizer=SimpleNamespace(send_output=lambda message, _: made.sent.append(message))
    )
    monkeypatch.setattr(
        Scheduler, "_add_request_to_queue", lambda self, req, is_retracted=False: self.waiting_queue.append(req)
    )
    return made


def arrive(scheduler: Any, monkeypatch: pytest.MonkeyPatch, req: FakeReq, resume: ResumeState, **changes: Any) -> None:
    """A ResumedGenerateReqInput from the wire, of which upstream's handler makes ``req``."""

    def handle(self: Any, recv_req: Any) -> None:
        queue = self.grammar_manager.grammar_queue
        queue.append(req) if req.grammar == "compiling" else self._add_request_to_queue(req)

    monkeypatch.setattr(Scheduler, "handle_generate_request", handle)
    fields: dict[str, Any] = dict.fromkeys(["input_text", "input_ids", "input_embeds", "mm_inputs", "token_type_ids"])
    fields |= {"sampling_params": SamplingParams(), "return_logprob": False, "logprob_start_len": -1}
    fields |= {"top_logprobs_num": 0, "token_ids_logprob": None, "stream": True}
    scheduler.handle_resumed_request(ResumedGenerateReqInput(rid=req.rid, resume=resume, **(fields | changes)))


def test_resumed_requests_go_first_in_the_order_they_came(scheduler: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler._add_request_to_queue(FakeReq("new1"))
    arrive(scheduler, monkeypatch, FakeReq("old1"), ResumeState(output_ids=array("q", [5])))
    scheduler._add_request_to_queue(FakeReq("new2"))
    arrive(scheduler, monkeypatch, FakeReq("old2"), ResumeState(output_ids=array("q", [5, 6])))
    assert [req.rid for req in scheduler.waiting_queue] == ["old1", "old2", "new1", "new2"]
    assert [list(req.output_ids) for req in scheduler.waiting_queue] == [[5], [5, 6], [], []]
    assert [req.send_token_offset for req in scheduler.waiting_queue] == [1, 2, 0, 0]


def test_resume_waits_for_the_grammar(scheduler: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    req = FakeReq("r", grammar="compiling")
    arrive(scheduler, monkeypatch, req, ResumeState(output_ids=array("q", [5, 7])))
    scheduler._add_request_to_queue(FakeReq("other"))
    assert [queued.rid for queued in scheduler.waiting_queue] == ["other"] and not req.output_ids
    req.grammar = Grammar()
    scheduler._add_request_to_queue(req)
    assert req.grammar.accepted == [5, 7] and list(req.output_ids) == [5, 7]
    assert [queued.rid for queued in scheduler.waiting_queue] == ["r", "other"]


def test_aborted_while_its_grammar_compiled(scheduler: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    req = FakeReq("r", grammar="compiling")
    arrive(scheduler, monkeypatch, req, ResumeState(output_ids=array("q", [5, 7])))
    req.grammar, req.to_finish = None, "Aborted by AbortReq."
    scheduler._add_request_to_queue(req)
    assert not req.output_ids and not req.is_retracted and req.to_finish == "Aborted by AbortReq."


@pytest.mark.parametrize("output_ids", [[], [100], [-1], list(range(10)), [9, 3]])
def test_a_bad_resume_aborts_that_request_by_name(
    scheduler: Any, monkeypatch: pytest.MonkeyPatch, output_ids: list[int]
) -> None:
    arrive(scheduler, monkeypatch, FakeReq("bad~7", grammar=Grammar()), ResumeState(output_ids=array("q", output_ids)))
    (req,) = scheduler.waiting_queue
    assert "bad~7" in req.to_finish
    assert not req.output_ids and not req.is_retracted and req.send_token_offset == 0


def test_what_can_never_resume_is_answered_at_the_door(scheduler: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    arrive(scheduler, monkeypatch, FakeReq("r~1"), ResumeState(output_ids=array("q", [5])), input_embeds=[[0.1]])
    assert not scheduler.waiting_queue
    (answer,) = scheduler.sent
    assert isinstance(answer, AbortReq) and answer.rid == "r~1"
    assert "r~1" in answer.finished_reason["message"] and "input embeddings" in answer.finished_reason["message"]


@pytest.fixture
def beats(scheduler: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Beats]:
    for name in ("run_batch", "process_input_requests", "on_idle", "_record_scheduler_state_for_paused_engine"):
        monkeypatch.setattr(Scheduler, name, lambda self, *args, **kwargs: None)
    made = Beats()
    monkeypatch.setattr(KevlarScheduler, "heartbeat", made)
    yield made


def batch(requests: int, extend_tokens: int = 0) -> Any:
    return SimpleNamespace(
        forward_mode=SimpleNamespace(is_extend=lambda: extend_tokens > 0),
        reqs=[SimpleNamespace(rid=f"r{i}") for i in range(requests)],
        # left over from its life as a prefill batch when it decodes
        extend_num_tokens=extend_tokens or 999,
    )


def test_a_request_is_announced_before_it_runs_for_the_first_time(scheduler: Any, beats: Beats) -> None:
    """What kills a group must have been named before; a request that only waits is not named."""
    resumed = SimpleNamespace(rid="b", kevlar_resumed_context=30, prefix_indices=range(12), prefix_len=12)
    prefill = batch(0, extend_tokens=4)
    prefill.reqs = [SimpleNamespace(rid="a"), resumed]
    scheduler.run_batch(prefill)
    scheduler.run_batch(prefill)  # the next chunk
    assert [(report.rid, report.recomputed_tokens) for report in scheduler.sent] == [("a", 0), ("b", 18)]


def test_heartbeat_states_the_tokens_that_may_be_waited_for(scheduler: Any, beats: Beats) -> None:
    scheduler.run_batch(batch(2, extend_tokens=4000))
    # With overlap this step waits for the result of the prefill.
    scheduler.run_batch(batch(2))
    scheduler.run_batch(batch(3))
    scheduler.on_idle()
    scheduler.run_batch(batch(1))
    assert beats.seen == [4000, 4002, 5, "idle", 1]


class Over(BaseException):
    pass


def test_what_a_pass_computed_is_copied_when_it_is_done_and_not_when_the_epoch_is_over(
    scheduler: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a device the pass may still wait for another rank, and one that is given up leaves anything behind."""
    order: list[str] = []
    exporter = SimpleNamespace(before_result=lambda _: order.append("copied"), after_result=lambda _: None)
    auditor = SimpleNamespace(before_result=lambda _: order.append("audited"))
    scheduler.shadow, scheduler._promoter = SimpleNamespace(exporter=exporter), SimpleNamespace(auditor=auditor)
    scheduler._forced = SimpleNamespace(check=lambda _: None)
    monkeypatch.setattr(Scheduler, "process_batch_result", lambda *_: order.append("processed"))
    done = SimpleNamespace(synchronize=lambda: order.append("done"))
    scheduler.process_batch_result(batch(1), SimpleNamespace(copy_done=done))
    assert order == ["done", "copied", "audited", "processed"]

    def leave() -> None:
        raise Over

    with pytest.raises(Over):
        scheduler.process_batch_result(batch(1), SimpleNamespace(copy_done=SimpleNamespace(synchronize=leave)))
    assert len(order) == 4


@pytest.mark.parametrize(("device", "stages", "waits"), [("cpu", 1, False), ("cuda", 1, True), ("cuda", 2, False)])
def test_a_result_without_an_event_is_waited_for_on_a_device(
    scheduler: Any, monkeypatch: pytest.MonkeyPatch, device: str, stages: int, waits: bool
) -> None:
    order: list[str] = []
    stream = SimpleNamespace(synchronize=lambda: order.append("done"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(scheduler_module, "get_parallel", lambda: SimpleNamespace(pp_size=stages))
    scheduler.device = device
    scheduler._wait_for_pass(SimpleNamespace(copy_done=None))
    assert order == ["done"] * waits


def test_heartbeat_of_control_requests_and_pauses(scheduler: Any, beats: Beats) -> None:
    scheduler.run_batch(batch(2))
    scheduler.process_input_requests([])
    scheduler.process_input_requests([FlushCacheReqInput()])
    scheduler._record_scheduler_state_for_paused_engine()
    assert beats.seen == [2, "control", 2, "idle"]


def test_without_heartbeat(scheduler: Any, beats: Beats, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KevlarScheduler, "heartbeat", None)
    scheduler.run_batch(batch(2))
    scheduler.process_input_requests([FlushCacheReqInput()])
    scheduler.on_idle()
    assert beats.seen == []
