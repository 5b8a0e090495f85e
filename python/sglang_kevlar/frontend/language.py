"""SGLang's frontend language on our Engine: a backend that asks it where `RuntimeEndpoint` asks a server."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterator
from typing import TYPE_CHECKING, Any

from sglang.lang.backend.base_backend import BaseBackend
from sglang.lang.backend.runtime_endpoint import RuntimeEndpoint
from sglang.lang.chat_template import get_chat_template_by_model_path
from sglang.lang.global_config import global_config
from sglang.srt.managers.io_struct import GenerateReqInput

if TYPE_CHECKING:
    from sglang_kevlar.frontend.groups_engine import GroupsEngine

#: fields of a program's `gen` that are not sampling parameters
_RETURNED = ("return_logprob", "logprob_start_len", "top_logprobs_num", "return_text_in_logprobs")


class EngineBackend(RuntimeEndpoint):  # type: ignore[misc]
    """What ``Engine.endpoint`` is. Programs run in threads of their own, so a thread turns the Engine's event loop
    from now on: the Engine's own synchronous methods cannot be called any more."""

    def __init__(self, engine: GroupsEngine) -> None:
        BaseBackend.__init__(self)  # not RuntimeEndpoint's, which asks a server
        if engine.loop.is_running():
            raise RuntimeError(
                "this Engine is used inside a running event loop, which programs in the frontend language would wait "
                "for: make the Engine outside of it, or use sglang_kevlar.launch_server and a RuntimeEndpoint"
            )
        # Upstream has no endpoint for that: its interpreter appends the text.
        self.support_concate_and_append = False
        self.model_info = {"model_path": engine.tokenizer_manager.model_path}
        self.chat_template = get_chat_template_by_model_path(self.model_info["model_path"])
        self._engine = engine
        self._loop = engine.loop
        self._thread = threading.Thread(target=self._loop.run_forever, name="engine-loop", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """The loop stands still, as before."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def generate(self, s: Any, sampling_params: Any) -> tuple[str, dict[str, Any]]:
        answer = self._generate_http_request(s, self._request(s, sampling_params))
        return answer["text"], answer["meta_info"]

    def generate_stream(self, s: Any, sampling_params: Any) -> Iterator[tuple[str, dict[str, Any]]]:
        request = self._request(s, sampling_params)
        answers = self._engine.tokenizer_manager.generate_request(GenerateReqInput(**request, stream=True), None)
        length = 0
        try:
            while (answer := self._wait(anext(answers, None))) is not None:
                text = answer["text"][length:]
                length += len(text)
                yield text, answer["meta_info"]
        finally:
            self._wait(answers.aclose())

    def cache_prefix(self, prefix_str: str) -> None:
        self._wait(self._first({"text": prefix_str, "sampling_params": {"max_new_tokens": 0}}))

    def commit_lazy_operations(self, s: Any) -> None:
        self.cache_prefix(s.text_)

    def fill_image(self, s: Any) -> None:
        self._add_images(s, {})

    def flush_cache(self) -> None:
        self._wait(self._engine.tokenizer_manager.flush_cache())

    def get_server_info(self) -> dict[str, Any]:
        return {"kevlar": self._engine.tokenizer_manager.kevlar_status()}

    # RuntimeEndpoint's `select` is what it asks through this.
    def _generate_http_request(self, s: Any, data: dict[str, Any]) -> Any:
        self._add_images(s, data)
        return self._wait(self._first(data))

    def _add_images(self, s: Any, data: dict[str, Any]) -> None:
        if s.images_:
            raise ValueError("images are not served: a request with them could not be continued on another group")

    def _request(self, s: Any, sampling_params: Any) -> dict[str, Any]:
        self._handle_dtype_to_regex(sampling_params)
        self._add_images(s, {})
        sampling = {
            "skip_special_tokens": global_config.skip_special_tokens_in_output,
            "spaces_between_special_tokens": global_config.spaces_between_special_tokens_in_out,
            **sampling_params.to_srt_kwargs(),
        }
        values = ((name, getattr(sampling_params, name, None)) for name in _RETURNED)
        return {"text": s.text_, "sampling_params": sampling, **{n: value for n, value in values if value is not None}}

    async def _first(self, request: dict[str, Any]) -> Any:
        return await anext(self._engine.tokenizer_manager.generate_request(GenerateReqInput(**request), None))

    def _wait(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()
