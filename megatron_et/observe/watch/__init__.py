"""`megatron-et watch`: a live terminal view of a run."""
