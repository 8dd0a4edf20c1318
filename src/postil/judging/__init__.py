"""Judging: what an adapter gained on its target and lost in general, as a score card, and the gate on it."""
