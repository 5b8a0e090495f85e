"""``--stock``: SGLang's own server, as ``python -m sglang.launch_server`` starts it.

A module of ours around it only because a CPU build of torch cannot import torchvision without the shim.
SGLang's child processes import the main module again, and so get it too.
"""

from __future__ import annotations

import runpy

from sglang_kevlar.platform import torchvision_shim

torchvision_shim.install()

if __name__ == "__main__":
    runpy.run_module("sglang.launch_server", run_name="__main__")
