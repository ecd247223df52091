"""The method on tensors: no Megatron, no torch.distributed.

Begin with routing.py, the rule; quantile.py and threshold.py say where thresholds come from.
"""
