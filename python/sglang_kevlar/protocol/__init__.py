"""What processes say to each other, and nothing else: no I/O, no torch, no sglang.

``launch``     written once by the launcher, read by every process it starts
``group``      between a group supervisor and the frontend
``heartbeat``  the shared page by which a process says what it is doing
"""
