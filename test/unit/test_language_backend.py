"""The backend of the frontend language on an Engine: what it asks, and whose event loop it turns."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_kevlar.platform import torchvision_shim

torchvision_shim.install()

import sglang as sgl  # noqa: E402

from sglang_kevlar.frontend.language import EngineBackend  # noqa: E402


class Manager:
    """Answers with the last word of the prompt, in two pieces when it streams."""

    model_path = "model"

    def __init__(self, fails: bool = False) -> None:
        self.asked: list[Any] = []
        self.closed = 0
        self.fails = fails

    async def generate_request(self, obj: Any, request: Any) -> Any:
        self.asked.append(obj)
        if self.fails:
            raise ValueError("not served")
        try:
            await asyncio.sleep(0)
            for text in ("wo", "word") if obj.stream else ("word",):
                yield {"text": text, "meta_info": {"id": "1"}}
        finally:
            self.closed += 1


@pytest.fixture
def backend():
    backends = []

    def make(manager: Manager) -> EngineBackend:
        engine = SimpleNamespace(loop=asyncio.new_event_loop(), tokenizer_manager=manager)
        backends.append((EngineBackend(engine), engine.loop))
        return backends[-1][0]

    yield make
    for made, loop in backends:
        made.close()
        assert not loop.is_running()
        loop.close()


@sgl.function
def program(s: Any) -> None:
    s += "a " + sgl.gen("b", max_tokens=5, regex="[a-z]+", return_logprob=True)


def test_a_program_asks_the_engine(backend: Any) -> None:
    manager = Manager()
    state = program.run(backend=backend(manager), temperature=0)
    assert state.text() == "a word" and state["b"] == "word"
    [asked] = manager.asked
    assert asked.text == "a " and asked.return_logprob is True and not asked.stream
    sampling = asked.sampling_params
    assert (sampling["max_new_tokens"], sampling["regex"], sampling["temperature"]) == (5, "[a-z]+", 0)


def test_a_streaming_program_gets_pieces(backend: Any) -> None:
    manager = Manager()
    state = program.run(backend=backend(manager), temperature=0, stream=True)
    pieces = [piece for piece in state.text_iter() if piece]
    # How many is a matter of threads: some may have come together.
    assert pieces and "".join(pieces) == "a word"
    assert manager.closed == 1


def test_the_error_of_a_request_is_the_programs(backend: Any) -> None:
    with pytest.warns(UserWarning, match="not served"):
        state = program.run(backend=backend(Manager(fails=True)), temperature=0)
        state.sync()
    assert "not served" in str(state.error())


def test_an_engine_inside_a_running_loop_is_refused() -> None:
    async def inside() -> None:
        engine = SimpleNamespace(loop=asyncio.get_running_loop(), tokenizer_manager=Manager())
        with pytest.raises(RuntimeError, match="inside a running event loop"):
            EngineBackend(engine)

    asyncio.run(inside())


def test_images_are_refused(backend: Any) -> None:
    with pytest.raises(ValueError, match="images are not served"):
        backend(Manager())._add_images(SimpleNamespace(images_=[("x", "data")]), {})
