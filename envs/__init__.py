"""Simulated tasks behind one batched interface."""
