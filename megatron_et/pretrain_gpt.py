"""GPT pretraining with Megatron-Core from pip packages alone, Expert Threshold routing available:

    torchrun --nproc-per-node 8 -m megatron_et.pretrain_gpt --moe-router-type expert-threshold <Megatron's GPT
    flags>

Teams with a Megatron-LM checkout run their own script instead: `python -m megatron_et pretrain_gpt.py
<flags>`.
"""


def main() -> None:
    """Install the plug-in, then pretrain."""
    from megatron_et.run.launch import prepare_process

    prepare_process()
    # Only now: it imports Megatron, which the CPU backend must come before.
    from megatron_et.run.gpt import pretrain_gpt

    pretrain_gpt()


# Checkpoint writers are spawned and import this module again, under another name: they must not train.
if __name__ == "__main__":
    main()
