"""I3 on real Megatron training: neither thresholds nor losses depend on how the work is split."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.runs import ET_ARGS, GPT_ARGS, MOE_LAYERS, Run, forked_pretrain
from tests.launch import words
from tests.megatron_here import needs_training

pytestmark = [pytest.mark.distributed, needs_training]

EP2 = "--expert-model-parallel-size 2 "
EP4 = "--expert-model-parallel-size 4 "
TP2 = "--tensor-model-parallel-size 2 --sequence-parallel "
ETP1 = "--expert-tensor-parallel-size 1 "
PP2 = "--pipeline-model-parallel-size 2 "
VPP2 = PP2 + "--num-virtual-stages-per-pipeline-rank 2 "
FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1 "
SELECTIVE = "--recompute-granularity selective --recompute-modules moe "
ALLGATHER = "--moe-token-dispatcher-type allgather "
MBS1, MBS4, MBS8 = (f"--micro-batch-size {n} " for n in (1, 4, 8))

# name -> (processes, flags); without a flag the micro-batch is 2 of the 8 samples.
LAYOUTS = {
    "accumulate-8": (1, MBS1),
    "accumulate-1": (1, MBS8),
    "dp2": (2, ""),
    "dp2-recompute": (2, MBS4 + SELECTIVE),
    "ep2": (2, EP2),
    "ep2-accumulate-4": (2, EP2 + MBS1 + FULL),
    "ep2-allgather": (2, EP2 + ALLGATHER),
    "tp2": (2, TP2),
    "pp2": (2, PP2),
    "pp2-vpp2": (2, VPP2),
    "ep4": (4, EP4),
    "ep4-accumulate-2": (4, EP4 + MBS1),
    "ep2-dp4": (4, EP2),
    "ep2-tp2": (4, EP2 + TP2),
    "ep4-tp2-etp1": (4, EP4 + TP2 + ETP1),
    "ep2-tp2-allgather": (4, EP2 + TP2 + ALLGATHER),
    "ep2-pp2": (4, EP2 + PP2 + MBS1),
    "ep2-pp2-vpp2-recompute": (4, EP2 + VPP2 + FULL),
}
WARMUP, STEPS = 2, 6


def fed(processes: int, flags: str, folder: Path) -> Run:
    """A run whose routers see the same logits for the same tokens in every layout."""
    script = str(Path(__file__).parent / "fed_pretrain.py")
    args = f"{flags} --train-iters {STEPS} --moe-et-warmup-steps {WARMUP}"
    return forked_pretrain(args, processes=processes, folder=folder, command=("-m", "megatron_et", script))


def of_layers(run: Run, *names: str) -> dict[tuple[int, str], list[Any]]:
    """(step, layer) -> entries of the trace, floats as they are."""
    return {
        (step, layer): [record["layers"][layer][name] for name in names]
        for step, record in run.trace.items()
        for layer in MOE_LAYERS
    }


@pytest.fixture(scope="module")
def fed_once(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One process, accumulating four micro-batches."""
    return fed(1, "", tmp_path_factory.mktemp("fed"))


@pytest.mark.parametrize(("processes", "flags"), LAYOUTS.values(), ids=LAYOUTS.keys())
def test_thresholds_are_bitwise_the_same(processes: int, flags: str, fed_once: Run, tmp_path: Path) -> None:
    """Thresholds and cutoffs of every batch; then what experts and tokens got as well."""
    run = fed(processes, flags, tmp_path)
    assert sorted(run.trace) == list(range(1, STEPS + 1))
    assert of_layers(run, "threshold", "cutoff") == of_layers(fed_once, "threshold", "cutoff")
    routed, expected = (of_layers(r, "usage", "fanout_histogram") for r in (run, fed_once))
    for (step, layer), counts in routed.items():
        if step > WARMUP:
            assert counts == expected[step, layer]
        else:
            assert counts[0] == [2 / 8] * 8  # Expert Choice: exactly k of every pool


# Without dropout, from one checkpoint: fp32 runs then differ by the order of additions alone.
ROUTINGS = {"expert-threshold": ET_ARGS, "topk": []}
START, END = 8, 14
AGREE = 1e-5  # relative; losses are printed with seven digits

# Equal padded vocabularies for TP 1 and 2.
PLAIN_GPT = [
    *GPT_ARGS,
    *words("--hidden-dropout 0 --attention-dropout 0 --eval-iters 0 --make-vocab-size-divisible-by 64"),
]


def continued(routing: str, processes: int, flags: str, checkpoint: Path, folder: Path) -> Run:
    """Training on from the checkpoint in another layout, with a fresh optimizer."""
    args = f"{flags} --train-iters {END} --load {checkpoint} --no-load-optim --no-load-rng"
    return forked_pretrain(args, processes=processes, folder=folder, et=ROUTINGS[routing], model=PLAIN_GPT)


type Straight = Callable[[str], tuple[Path, Run]]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Straight:
    """Per routing: a checkpoint, and the run of one process that goes on from it."""

    @functools.cache
    def make(routing: str) -> tuple[Path, Run]:
        folder = tmp_path_factory.mktemp(routing)
        save = f"{EP2} --train-iters {START} --save {folder}"
        forked_pretrain(save, et=ROUTINGS[routing], model=PLAIN_GPT)
        return folder, continued(routing, 1, "", folder, folder / "straight")

    return make


def losses_agree(routing: str, layout: str, straight: Straight, folder: Path) -> tuple[Run, Run]:
    """Run the layout, compare its losses with one process's, return both runs."""
    checkpoint, one = straight(routing)
    processes, flags = LAYOUTS[layout]
    run = continued(routing, processes, flags, checkpoint, folder)
    assert sorted(run.loss) == list(range(START + 1, END + 1))
    for step in run.loss:
        assert float(run.loss[step]) == pytest.approx(float(one.loss[step]), rel=AGREE)
    return run, one


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_agree(layout: str, straight: Straight, tmp_path: Path) -> None:
    """With the gates' real products, thresholds and loads agree as well, to rounding."""
    run, one = losses_agree("expert-threshold", layout, straight, tmp_path)
    for step in run.loss:
        for layer in MOE_LAYERS:
            ours, theirs = (r.trace[step]["layers"][layer] for r in (run, one))
            assert ours["threshold"] == pytest.approx(theirs["threshold"], abs=1e-3)
            assert ours["usage"] == pytest.approx(theirs["usage"], abs=3 / 512)  # a few tokens of 512


@pytest.mark.parametrize("layout", ["dp2", "ep2-allgather", "tp2", "pp2-vpp2", "ep4", "ep2-tp2"])
def test_losses_of_topk_agree_too(layout: str, straight: Straight, tmp_path: Path) -> None:
    """The yardstick: Megatron's own top-k through the same layouts, held to the same tolerance."""
    losses_agree("topk", layout, straight, tmp_path)
