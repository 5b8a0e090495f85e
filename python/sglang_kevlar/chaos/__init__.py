"""Fault injection against a running server: load, faults and checks from one file, a timeline and a verdict."""
