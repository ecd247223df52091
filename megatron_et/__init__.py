"""Expert Threshold routing for Megatron-Core (arXiv 2603.11535)."""

__version__ = "0.1.0"
