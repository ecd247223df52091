"""Pretraining in which the router of layer 3 sees POISON (nan or inf) logits from the third global batch on
(test_training.py)."""

if __name__ == "__main__":
    import os

    import torch

    from megatron_et.moe.router import ExpertThresholdRouter
    from megatron_et.run.gpt import pretrain_gpt

    value = float(os.environ["POISON"])
    original = ExpertThresholdRouter.gating

    def gating(self: ExpertThresholdRouter, input: torch.Tensor) -> torch.Tensor:
        logits = original(self, input)
        if (
            self.layer_number == 3
            and self.thresholds.updates_on_host() == 2
            and torch.distributed.get_rank() == 1
        ):
            logits = torch.where(torch.arange(logits.shape[-1]) == 5, value, logits)
        return logits

    ExpertThresholdRouter.gating = gating  # type: ignore[method-assign]
    pretrain_gpt()
