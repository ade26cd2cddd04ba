"""Policies, one file per method, and the actors that play their chunks."""
