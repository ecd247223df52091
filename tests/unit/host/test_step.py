"""One step of megatron.training as our two seams see it: what starts, what waits, what is dropped."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_et.errors import HookNotCalledError, NonFiniteLogitsError
from megatron_et.rule.quantile import kth_largest
from tests.captured import router

pytestmark = pytest.mark.filterwarnings(r"ignore::UserWarning:megatron\.")

TOKENS = 40


class Step:
    """A model of two routers, an all-reduce over two ranks that see the same, and what happened in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from megatron_et.host import grads, step

        monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "all_reduce", self._all_reduce)
        self.events: list[str] = []
        self.routers = [router(False, warmup_steps=0, ema_decay=0.0) for _ in range(2)]
        for one in self.routers:
            one.tp_dp_cp_group = SimpleNamespace(size=lambda: 2)
        self.model = [torch.nn.ModuleList(self.routers)]
        self._finalize = grads._finalize_model_grads(lambda _: self.events.append("gradients"))
        self._train_step = step._train_step(self._original)
        self._agree = step._agree_on_success(self._waits_for_the_gpu)

    def _all_reduce(self, tensor: torch.Tensor, *, group: Any, async_op: bool) -> Any:  # noqa: ARG002
        assert async_op
        self.events.append("reduce")

        def wait() -> None:
            if work.waited == 0:
                tensor.mul_(2)  # nothing may be read before
            work.waited += 1
            self.events.append("wait")

        work = SimpleNamespace(wait=wait, waited=0)
        return work

    def forward_backward(self, logits: torch.Tensor) -> None:
        for one in self.routers:
            one.routing(logits.clone().requires_grad_())
        self._finalize(self.model)

    def _waits_for_the_gpu(self, successful: bool) -> bool:
        self.events.append("agree")
        return successful

    def _original(self, forward_backward: Any, *_: Any) -> tuple[dict[str, float], bool]:
        if not (optimizes := forward_backward()):
            return {}, True
        self.events.append("optimizer")
        return {}, not self._agree(optimizes == "counts")

    def __call__(self, *passes: torch.Tensor, then: str = "counts") -> list[str]:
        """Run it with so many forward-backward passes, of which the last counts; then it counts, is skipped,
        or is left ("")."""

        def forward_backward() -> str:
            for logits in passes:
                self.forward_backward(logits)
            return then

        self.events.clear()
        self._train_step(forward_backward, None, self.model)
        return self.events

    @property
    def thresholds(self) -> list[torch.Tensor]:
        return [one.thresholds.value for one in self.routers]


@pytest.fixture
def step(monkeypatch: pytest.MonkeyPatch) -> Step:
    return Step(monkeypatch)


def drawn(seed: int) -> torch.Tensor:
    return torch.randn(TOKENS, 8, generator=torch.Generator().manual_seed(seed))


def expected(step: Step, logits: torch.Tensor) -> torch.Tensor:
    return kth_largest(logits, TOKENS * step.routers[0].topk // 8)


def test_the_reduction_has_the_optimizer_step_to_hide_behind(step: Step) -> None:
    """And the host enqueues what comes of it before it waits for the GPU."""
    assert step(drawn(0)) == ["reduce", "gradients", "optimizer", "wait", "agree"]
    for thresholds in step.thresholds:
        torch.testing.assert_close(thresholds, expected(step, drawn(0)), rtol=0.1, atol=0.1)
    for one in step.routers:
        assert one.thresholds.updates_on_host() == 1
        assert one.last_batch.counts.tokens.tolist() == [2 * TOKENS]


SKIPPED = ["reduce", "gradients", "optimizer", "wait", "agree"]
LEFT = ["reduce", "gradients", "wait"]


@pytest.mark.parametrize(("then", "events"), [("skipped", SKIPPED), ("", LEFT)], ids=["skipped", "left"])
def test_a_step_that_does_not_count_waits_and_leaves_no_trace(
    then: str, events: list[str], step: Step
) -> None:
    step(drawn(0))
    before = [thresholds.clone() for thresholds in step.thresholds]
    assert step(drawn(1) + 5.0, then=then) == events
    for one, thresholds, old in zip(step.routers, step.thresholds, before, strict=True):
        assert torch.equal(thresholds, old)
        assert one.thresholds.updates_on_host() == 1
        assert one.last_batch is None
    step(drawn(2))  # and the next one counts its own
    for one in step.routers:
        assert one.last_batch.counts.tokens.tolist() == [2 * TOKENS]


def test_a_pass_that_is_run_again_counts_once(step: Step) -> None:
    events = step(drawn(0) + 9.0, drawn(1))
    assert events == ["reduce", "gradients", "wait", "reduce", "gradients", "optimizer", "wait", "agree"]
    for one, thresholds in zip(step.routers, step.thresholds, strict=True):
        torch.testing.assert_close(thresholds, expected(step, drawn(1)), rtol=0.1, atol=0.1)
        assert one.last_batch.counts.tokens.tolist() == [2 * TOKENS]


def test_a_step_that_reduced_nothing_is_an_error(step: Step) -> None:
    step(drawn(0))
    with pytest.raises(HookNotCalledError, match="statistics were not reduced in this step"):
        step()


def test_nonfinite_logits_stop_the_step_and_leave_the_thresholds(step: Step) -> None:
    step(drawn(0))
    before = [thresholds.clone() for thresholds in step.thresholds]
    bad = drawn(1)
    bad[3, 2] = torch.nan
    # On both ranks.
    with pytest.raises(NonFiniteLogitsError, match=r"2 router logits of .* in global batch 2"):
        step(bad)
    for thresholds, old in zip(step.thresholds, before, strict=True):
        assert torch.equal(thresholds, old)


def test_nonfinite_logits_of_a_skipped_step_are_forgotten(step: Step) -> None:
    """An overflow in fp16 is what loss scaling is for."""
    step(torch.full((TOKENS, 8), torch.inf), then="skipped")
    step(drawn(0))
    assert all(one.thresholds.updates_on_host() == 1 for one in step.routers)


def test_a_step_that_failed_leaves_nothing_to_the_next(step: Step) -> None:
    class Failure(Exception):
        pass

    def fails() -> str:
        step.forward_backward(drawn(0) + 9.0)
        raise Failure

    with pytest.raises(Failure):
        step._train_step(fails, None, step.model)
    step.events.clear()
    assert step(drawn(1))[:2] == ["wait", "reduce"]
    for one in step.routers:
        assert one.last_batch.counts.tokens.tolist() == [2 * TOKENS]
