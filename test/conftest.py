"""Shared by all tests: the models, made once by scripts/make_models.py."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, str(REPOSITORY / "test" / "e2e"))
sys.path.insert(0, str(REPOSITORY / "test"))


def pytest_collection_finish() -> None:
    """What the imports have left is for good. Looking through it takes the collector a third of a second and more, and
    a test whose process stands still for so long sees leases and deadlines pass."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # or libraries report what is left at the end as leaks


DIRECTORY = Path(os.environ.get("KEVLAR_TEST_MODELS", REPOSITORY / "models"))


def make_models(directory: Path, *arguments: str) -> None:
    script = REPOSITORY / "scripts" / "make_models.py"
    subprocess.run([sys.executable, str(script), str(directory), *arguments], check=True, stdout=subprocess.DEVNULL)


@pytest.fixture(scope="session")
def models() -> Path:
    """The directory of test models (KEVLAR_TEST_MODELS, or `models` in the repository)."""
    make_models(DIRECTORY)
    return DIRECTORY


@pytest.fixture(scope="session")
def other_weights() -> Path:
    """The model `llama-f32` with other random weights."""
    make_models(DIRECTORY / "other", "--kind", "llama", "--seed", "5")
    return DIRECTORY / "other" / "llama-f32"
