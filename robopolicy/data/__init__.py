"""Demonstrations: files, the episode store, training windows."""
