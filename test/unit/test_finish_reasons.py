"""Which ends of a request count against its group."""

from __future__ import annotations

import inspect

import pytest

from frontend_fakes import tokenized  # noqa: F401  (imports sglang with what it needs)
from sglang_kevlar.frontend import finish_reasons
from sglang_kevlar.frontend.finish_reasons import is_internal_error

# isort: split
from sglang.srt.managers import schedule_batch


def abort(status: int, message: str = "boom") -> dict[str, object]:
    return {"type": "abort", "status_code": status, "message": message}


def test_internal_errors_count_and_what_the_client_did_does_not() -> None:
    assert is_internal_error(abort(500))
    assert not any(map(is_internal_error, (None, {"type": "length"}, abort(400), abort(503))))


@pytest.mark.parametrize("begin", finish_reasons._CAPACITY)
def test_a_full_pool_is_no_fault_of_the_group(begin: str) -> None:
    assert not is_internal_error(abort(500, f"{begin} and more"))
    source = inspect.getsource(schedule_batch)
    assert begin in source, "upstream says it in other words now"
