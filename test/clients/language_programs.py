"""Programs in SGLang's frontend language. Each returns all that its author can see: the text and the variables."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang_kevlar.platform import torchvision_shim

torchvision_shim.install()

import sglang as sgl  # noqa: E402

TOKENS = 48


@sgl.function
def _essay(s: Any, subject: str) -> None:
    s += sgl.system("You write Python.")
    s += sgl.user(f"Write about {subject}.")
    s += sgl.assistant(sgl.gen("outline", max_tokens=TOKENS, ignore_eos=True))
    s += sgl.user("Go on.")
    s += sgl.assistant(sgl.gen("text", max_tokens=TOKENS, ignore_eos=True, frequency_penalty=0.3))


def gen() -> Any:
    state = _essay.run(subject="lists", temperature=0)
    return state.text(), state.messages(), state["outline"], state["text"]


@sgl.function
def _forked(s: Any) -> None:
    s += "def main():\n"
    branches = s.fork(3)
    for number, branch in enumerate(branches):
        branch += f"    # way {number}\n" + sgl.gen("way", max_tokens=TOKENS, ignore_eos=True)
    for number, branch in enumerate(branches):
        s += f"    # {number}: " + branch["way"] + "\n"
    s += sgl.gen("end", max_tokens=TOKENS, ignore_eos=True)


def fork() -> Any:
    state = _forked.run(temperature=0)
    return state.text(), state["end"]


@sgl.function
def _chosen(s: Any) -> None:
    s += "import os\nimport sys\n"
    for number in range(4):
        s += f"step_{number} = " + sgl.select(f"choice {number}", ["os.path", "sys.argv", "None", "print(sys.path)"])
        s += "\n" + sgl.gen(f"line {number}", max_tokens=16, ignore_eos=True) + "\n"
        s += sgl.gen(f"other choice {number}", choices=["yes", "no", "later"])


def select() -> Any:
    state = _chosen.run(temperature=0)
    names = [f"{kind} {number}" for kind in ("choice", "line", "other choice") for number in range(4)]
    decided = state.get_meta_info("choice 3")["normalized_prompt_logprobs"]
    return state.text(), [state[name] for name in names], decided


@sgl.function
def _decided(s: Any) -> None:
    # Upstream's two other ways to choose fail in the client without any fault (docs/clients.md).
    s += "The answer is "
    s += sgl.gen("first", choices=["42", "forty two", "unknown"], choices_method=sgl.token_length_normalized)
    s += sgl.gen("more", max_tokens=TOKENS, ignore_eos=True)
    s += sgl.gen("then", choices=["a", "b", "c d e"])


def choices() -> Any:
    state = _decided.run(temperature=0)
    return state.text(), state["first"], state["then"]


@sgl.function
def _bound(s: Any) -> None:
    s += "The address is " + sgl.gen("address", regex=r"((25[0-5]|[0-9]{1,2})\.){11}[0-9]{1,3}", max_tokens=TOKENS * 2)
    s += " and the words " + sgl.gen("words", regex=r"([a-z]{1,8} ){20}", max_tokens=TOKENS * 2)
    s += " and the number " + sgl.gen_int("number", max_tokens=8)


def regex() -> Any:
    state = _bound.run(temperature=0)
    return state.text(), state["address"], state["words"], state["number"]


def stream() -> Any:
    state = _essay.run(subject="streams", temperature=0, stream=True)
    pieces = list(state.text_iter())
    assert len(pieces) > 10
    assert "".join(pieces) == state.text()
    return state.text()


def run_batch() -> Any:
    subjects = [{"subject": f"the number {number}"} for number in range(6)]
    return [state.text() for state in _essay.run_batch(subjects, temperature=0, num_threads=6, progress_bar=False)]


PROGRAMS: dict[str, Callable[[], Any]] = {
    program.__name__: program for program in (gen, fork, select, choices, regex, stream, run_batch)
}
