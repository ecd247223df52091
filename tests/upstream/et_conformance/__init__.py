"""Megatron's own MoE unit tests, run against our router and dispatchers (`make upstream-tests`,
docs/conformance.md).

A package of its own name, put on the path as such: in a test process `tests` means Megatron's tests.
"""
