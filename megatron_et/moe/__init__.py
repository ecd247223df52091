"""What stands in Megatron-Core's MoE layer; knows megatron.core, never megatron.training.

A new dispatcher goes into dispatchers.py; what a setting excludes into compatibility.py.
"""
