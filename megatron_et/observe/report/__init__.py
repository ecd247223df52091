"""Reads the logs and traces of a run and turns them into numbers, tables and plots (`megatron-et report`)."""


class ReportError(ValueError):
    """A run, or a file of it, that cannot be reported."""
