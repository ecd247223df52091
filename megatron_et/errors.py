"""Errors that a training job can meet after its flags were accepted."""


class NonFiniteLogitsError(FloatingPointError):
    """NaN or infinite router logits: thresholds of this global batch would be meaningless and were not taken
    over."""


class HookNotCalledError(RuntimeError):
    """A seam of Megatron that the thresholds depend on was bypassed; going on would train with frozen
    thresholds."""
