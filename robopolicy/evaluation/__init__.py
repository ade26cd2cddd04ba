"""Rollouts, their statistics and what is shown of them."""
