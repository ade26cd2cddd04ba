"""The command line, one module per verb; the only place that knows Hydra."""
