"""A reinforcement learner's loop: rollouts of many samples, and new weights between the steps and in their middle.

Weights alternate between two checkpoints, so every sample can be judged: greedy tokens are those of the checkpoint
whose version it names, and no other. A step's update comes after its samples, or while they run: then generation is
paused with upstream's default mode, which gives every running sample back as aborted, and those are asked for again.
"""

from __future__ import annotations

import asyncio
import base64
import pickle
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Protocol

import httpx

PROMPTS = [f"def function_{number}(a, b):\n    " for number in range(8)]
#: samples that share a request: a batch of prompts, each with two
BATCH = [f"class Number{number}:\n    " for number in range(3)]
SAMPLING = {"temperature": 0, "max_new_tokens": 96, "ignore_eos": True}
LOGPROB_TOLERANCE = 1e-3
#: attempts at an update, each of which may lose a group in its middle
UPDATE_TRIES = 5

Answer = dict[str, Any]


class System(Protocol):
    """What is trained against: a server or an Engine."""

    async def generate(self, text: str | list[str], n: int) -> list[Answer]: ...
    async def pause(self) -> None: ...
    async def resume(self) -> None: ...
    async def flush(self) -> bool: ...
    async def from_disk(self, model: Path, version: str) -> tuple[bool, str]: ...
    async def from_tensors(self, model: Path, version: str) -> tuple[bool, str]: ...


def tensors_of(model: Path) -> list[tuple[str, Any]]:
    from safetensors.torch import load_file

    return [item for file in sorted(model.glob("*.safetensors")) for item in load_file(file).items()]


class Loop:
    def __init__(self, system: System, models: list[Path]) -> None:
        self._system, self._models = system, models
        #: of each checkpoint: prompt to (tokens, log-probabilities)
        self._references: list[dict[str, tuple[list[int], list[float]]]] = []
        #: version to checkpoint
        self._content: dict[str, int] = {"default": 0}
        self._now = 0
        self._wrong: list[str] = []
        self.samples = self.aborted = self.redirects = self.retried_updates = 0

    async def learn_references(self) -> None:
        """Undisturbed; ends with the first checkpoint in place."""
        for number in (0, 1):
            if number:
                await self._update(self._system.from_disk, "reference", number)
            prompts = PROMPTS + BATCH
            answers = await self._system.generate(prompts, 1)
            self._references.append({prompt: seen(answer) for prompt, answer in zip(prompts, answers, strict=True)})
        assert all(self._references[0][prompt][0] != self._references[1][prompt][0] for prompt in PROMPTS + BATCH)
        await self._update(self._system.from_disk, "step 0", 0)

    async def step(self, number: int, during: bool, tensors: bool) -> None:
        """One rollout, with an update during or after it. Every sample arrives."""
        content = 1 - self._content[f"step {number - 1}"]
        update = self._system.from_tensors if tensors else self._system.from_disk
        samples = [asyncio.create_task(self._sample(prompt)) for prompt in PROMPTS]
        samples.append(asyncio.create_task(self._sample(BATCH, n=2)))
        if during:
            await asyncio.sleep(0.3)
            await self._system.pause()
            await self._update(update, f"step {number}", content)
            await self._system.flush()
            await self._system.resume()
            await asyncio.gather(*samples)
        else:
            await asyncio.gather(*samples)
            await self._system.flush()
            await self._update(update, f"step {number}", content)
        # What the next step's policy is: every sample of it is of the new version.
        await self._sample(PROMPTS[0], of=f"step {number}")
        assert self._wrong == []

    async def _update(
        self, update: Callable[[Path, str], Awaitable[tuple[bool, str]]], name: str, content: int
    ) -> None:
        self._content[name] = content
        for _ in range(UPDATE_TRIES):
            success, message = await update(self._models[content], name)
            if success:
                return
            self.retried_updates += 1
        raise AssertionError(f"{name} was not taken: {message}")

    async def _sample(self, prompt: str | list[str], n: int = 1, of: str | None = None) -> None:
        """Asks until each of its samples was given whole."""
        prompts = [prompt] if isinstance(prompt, str) else prompt
        missing = [one for one in prompts for _ in range(n)]
        while missing:
            asked = missing if isinstance(prompt, list) and len(missing) < len(prompts) * n else None
            answers = await self._system.generate(asked or prompt, 1 if asked else n)
            assert len(answers) == len(missing), f"{len(answers)} samples of {len(missing)}"
            missing = [one for one, answer in zip(missing, answers, strict=True) if not self._judge(one, answer, of)]

    def _judge(self, prompt: str, answer: Answer, of: str | None) -> bool:
        """Whether it is whole. One that was given back has tokens of one of the checkpoints, and no mixture."""
        meta, (tokens, logprobs) = answer["meta_info"], seen(answer)
        self.redirects += meta.get("kevlar", {}).get("redirects", 0)
        if meta["finish_reason"]["type"] == "abort":
            self.aborted += 1
            if all(tokens != reference[prompt][0][: len(tokens)] for reference in self._references):
                self._wrong.append(f"given back: {tokens} is of no checkpoint")
            return False
        self.samples += 1
        version = meta["weight_version"]
        expected, expected_logprobs = self._references[self._content[version]][prompt]
        if tokens != expected:
            at = next(i for i, pair in enumerate(zip(tokens, expected, strict=False)) if pair[0] != pair[1])
            self._wrong.append(f"{version}: {prompt!r} differs at {at} of {len(tokens)}")
        elif any(abs(a - b) > LOGPROB_TOLERANCE for a, b in zip(logprobs, expected_logprobs, strict=True)):
            self._wrong.append(f"{version}: log-probabilities of {prompt!r}")
        if of is not None and version != of:
            self._wrong.append(f"{version} after {of}")
        return True


def seen(answer: Answer) -> tuple[list[int], list[float]]:
    logprobs = answer["meta_info"].get("output_token_logprobs") or []
    return answer["output_ids"], [entry[0] for entry in logprobs]


class OverHttp:
    """As trainers do that speak to a server."""

    def __init__(self, url: str) -> None:
        self._client = httpx.AsyncClient(base_url=url, timeout=120)

    async def generate(self, text: str | list[str], n: int) -> list[Answer]:
        body = {"text": text, "sampling_params": {**SAMPLING, "n": n}, "return_logprob": True}
        answers = await self._post("/generate", **body)
        return answers if isinstance(answers, list) else [answers]

    async def pause(self) -> None:
        await self._post("/pause_generation", mode="abort")

    async def resume(self) -> None:
        await self._post("/continue_generation")

    async def flush(self) -> bool:
        response = await self._client.post("/flush_cache")
        return response.status_code == 200

    async def from_disk(self, model: Path, version: str) -> tuple[bool, str]:
        return await self._update("/update_weights_from_disk", model_path=str(model), weight_version=version)

    async def from_tensors(self, model: Path, version: str) -> tuple[bool, str]:
        payload = base64.b64encode(pickle.dumps(tensors_of(model))).decode()
        await self._update("/begin_weight_update")
        try:
            return await self._update(
                "/update_weights_from_tensor", serialized_named_tensors=[payload], weight_version=version
            )
        finally:
            await self._update("/end_weight_update")

    async def _update(self, path: str, **body: Any) -> tuple[bool, str]:
        response = await self._client.post(path, json=body)
        return response.status_code == 200 and response.json().get("success", True), response.text

    async def _post(self, path: str, **body: Any) -> Any:
        response = await self._client.post(path, json=body)
        assert response.status_code == 200, f"{path}: {response.status_code} {response.text}"
        return response.json()


class OnEngine:
    """As trainers do that hold an Engine."""

    def __init__(self, engine: Any) -> None:
        self._engine, self._manager = engine, engine.tokenizer_manager

    async def generate(self, text: str | list[str], n: int) -> list[Answer]:
        answers = await self._engine.async_generate(text, {**SAMPLING, "n": n}, return_logprob=True)
        return answers if isinstance(answers, list) else [answers]

    async def pause(self) -> None:
        from sglang.srt.managers.io_struct import PauseGenerationReqInput

        await self._manager.pause_generation(PauseGenerationReqInput(mode="abort"))

    async def resume(self) -> None:
        from sglang.srt.managers.io_struct import ContinueGenerationReqInput

        await self._manager.continue_generation(ContinueGenerationReqInput())

    async def flush(self) -> bool:
        return (await self._manager.flush_cache()).success

    async def from_disk(self, model: Path, version: str) -> tuple[bool, str]:
        from sglang.srt.managers.io_struct import UpdateWeightFromDiskReqInput

        update = UpdateWeightFromDiskReqInput(model_path=str(model), weight_version=version)
        return (await self._manager.update_weights_from_disk(update, None))[:2]

    async def from_tensors(self, model: Path, version: str) -> tuple[bool, str]:
        from sglang.srt.managers.io_struct import (
            BeginWeightUpdateReqInput,
            EndWeightUpdateReqInput,
            UpdateWeightsFromTensorReqInput,
        )

        payload = pickle.dumps(tensors_of(model))
        update = UpdateWeightsFromTensorReqInput(serialized_named_tensors=[payload], weight_version=version)
        await self._manager.begin_weight_update(BeginWeightUpdateReqInput(), None)
        try:
            return (await self._manager.update_weights_from_tensor(update, None))[:2]
        finally:
            await self._manager.end_weight_update(EndWeightUpdateReqInput(), None)
