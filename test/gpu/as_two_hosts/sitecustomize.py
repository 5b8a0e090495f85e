"""Each process is a host of its own to NCCL, which refuses two ranks of one host on one device; so do its forks."""

import os


def _alone() -> None:
    os.environ["NCCL_HOSTID"] = str(os.getpid())


_alone()
os.register_at_fork(after_in_child=_alone)
