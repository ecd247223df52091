"""What people look at: metrics, alarms, the trace, `megatron-et report` and `megatron-et watch`.

Knows the rule's data classes at most. A new plot goes into report/plots.py.
"""
