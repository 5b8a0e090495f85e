"""On the path of a worker group under test: it takes itself for a newer version of the software."""

import sglang_kevlar

sglang_kevlar.__version__ = "9.9.9"
