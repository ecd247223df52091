"""Starting a training: the launcher, GPT from pip packages alone, Megatron on CPU."""
