"""Benchmarks: each file is a script; what they share is in machine.py (clocks, ceilings) and plain.py (references)."""
