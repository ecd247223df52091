"""Reads the logs and traces of a run and turns them into numbers, tables and plots (`megatron-et report`)."""
