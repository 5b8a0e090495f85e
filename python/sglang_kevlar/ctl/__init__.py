"""``python -m sglang_kevlar.ctl``: a running server from a terminal. No torch, no sglang."""
