"""Decisions, as pure state machines: no socket, thread or clock of their own.

Callers do the I/O and pass the time in, so that the same classes run in the server and in the simulation.
"""
