"""Text in, Megatron datasets out. Nothing here imports the rest of megatron_et."""
