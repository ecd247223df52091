"""Pretraining whose micro-batches have sequences of another length each (test_streams.py)."""

from itertools import count


def length(batch: int, index: int) -> int:
    """Sequence length of the index-th micro-batch of a global batch, counted over all data-parallel ranks: a
    multiple of 4 from 16 to 64."""
    return 16 + 4 * ((5 * batch + 7 * index) % 13)


if __name__ == "__main__":  # the guard that spawned checkpoint writers need
    import argparse
    from typing import Any

    from megatron.core import parallel_state
    from megatron.core.num_microbatches_calculator import get_num_microbatches
    from megatron.training import arguments

    from megatron_et.run import gpt

    parse, get_batch = arguments.parse_and_validate_args, gpt.get_batch
    calls = count()

    def parse_varying(*rest: Any, **kw: Any) -> argparse.Namespace:
        args = parse(*rest, **kw)
        args.variable_seq_lengths = True  # Megatron has no flag for it
        return args

    def get_shorter_batch(*rest: Any, **kw: Any) -> dict[str, Any]:
        batch, micro_batch = divmod(next(calls), get_num_microbatches())
        index = micro_batch * parallel_state.get_data_parallel_world_size()
        size = length(batch, index + parallel_state.get_data_parallel_rank())
        fields = get_batch(*rest, **kw)
        mask = fields.pop("attention_mask")
        shorter = {name: None if value is None else value[:, :size] for name, value in fields.items()}
        return {**shorter, "attention_mask": None if mask is None else mask[..., :size, :size]}

    arguments.parse_and_validate_args = parse_varying
    gpt.get_batch = get_shorter_batch
    gpt.pretrain_gpt()
