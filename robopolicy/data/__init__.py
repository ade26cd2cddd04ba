"""Demonstrations on disk, in memory, and as training batches."""

from .maniskill import load_demonstrations
from .store import EpisodeStore
from .windows import batches, find_windows

__all__ = ["EpisodeStore", "batches", "find_windows", "load_demonstrations"]
