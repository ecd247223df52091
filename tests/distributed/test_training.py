"""Real pretraining with thresholds through megatron.training.pretrain on CPU and gloo: layouts, resume,
baseline, bad input."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.custom_scalar.custom_scalars_plugin import CustomScalarsPlugin
from tensorboard.plugins.custom_scalar.metadata import CONFIG_SUMMARY_TAG
from tensorboard.plugins.scalar.scalars_plugin import ScalarsPlugin

from megatron_et import __version__
from megatron_et.data.dataset import write_dataset
from megatron_et.data.tokenizer import train_tokenizer
from megatron_et.observe.metrics import METRICS
from megatron_et.observe.trace import VERSIONS_TEXT
from tests.distributed.runs import (
    GPT_ARGS,
    MOE_LAYERS,
    Run,
    assert_same_tensors,
    assert_thresholds_replay,
    checkpoint_tensors,
    forked_pretrain,
    pretrain,
    router_counters,
)
from tests.megatron_here import needs_training

pytestmark = [pytest.mark.distributed, needs_training]

HERE = Path(__file__).parent
EP2 = "--expert-model-parallel-size 2 "
ITERATIONS = 10
TOKENS = 8 * 64
TARGET = 2 / 8


def check_healthy(
    run: Run, *, warmup: int = 4, iterations: int = ITERATIONS, loss_falls: float = 0.15
) -> None:
    """Loss falls, every layer is logged, warm-up loads are exactly on target, thresholds route afterwards
    and are the EMA of the cutoffs."""
    losses = [float(run.loss[i]) for i in range(1, iterations + 1)]
    assert losses[-1] < losses[0] - loss_falls, losses
    assert sorted(run.trace) == list(range(1, iterations + 1))
    for step, record in run.trace.items():
        assert record["tokens"] == TOKENS
        assert record["phase"] == ("warmup" if step <= warmup else "threshold")
        assert list(record["layers"]) == MOE_LAYERS
        for layer in record["layers"].values():
            assert sum(layer["fanout_histogram"]) == TOKENS
            if step <= warmup:
                assert layer["usage"] == [TARGET] * 8
            else:
                # The EMA lags behind a model that learns in ten steps. How far depends on its initial
                # weights, and they on the Megatron.
                assert 0.5 * 2 < sum(layer["usage"]) < 1.8 * 2
            assert all(value is not None for value in layer["cutoff"])
            if step > 1:
                assert all(value is not None for value in layer["threshold"])
    assert_thresholds_replay(run)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    """EP=2, distributed optimizer, alltoall, evaluation every 4 steps, checkpoints at 6 and 10,
    TensorBoard."""
    folder = tmp_path_factory.mktemp("base")
    args = f"{EP2} --train-iters {ITERATIONS} --save {folder} --save-interval 6 --tensorboard-dir {folder}/tb"
    return pretrain(args, folder=folder), folder


@pytest.mark.smoke
def test_base_run_is_healthy(base: tuple[Run, Path]) -> None:
    run, _ = base
    check_healthy(run)
    assert len(run.evaluation) == 2
    said = [line for line in run.output.splitlines() if line.startswith("[megatron_et] --moe-router-type")]
    assert len(said) == 1
    assert "moe_router_score_function=sigmoid, moe_router_dtype=fp32" in said[0]


@pytest.mark.smoke
def test_tensorboard_has_every_metric_per_layer_and_overall(base: tuple[Run, Path]) -> None:
    run, folder = base
    events = EventAccumulator(str(folder / "tb"), size_guidance={"scalars": 0}).Reload()
    tags = set(events.Tags()["scalars"])
    for name in METRICS:
        assert {f"moe/{name}", *(f"moe/{name}_layer_{n}" for n in MOE_LAYERS)} <= tags
    usage = {e.step: e.value for e in events.Scalars("moe/expert_usage_max_layer_3")}
    for step, record in run.trace.items():
        assert usage[step] == pytest.approx(max(record["layers"]["3"]["usage"]), rel=1e-6)
    gap = {e.step: e.value for e in events.Scalars("moe/cutoff_gap_layer_2")}
    assert sorted(gap) == list(range(2, ITERATIONS + 1))  # the first batch is routed without thresholds
    layer = run.trace[7]["layers"]["2"]
    expected = sum(abs(c - t) for c, t in zip(layer["cutoff"], layer["threshold"], strict=True)) / 8
    assert gap[7] == pytest.approx(expected, rel=1e-5)


def charts_drawn(folder: Path) -> dict[str, int]:
    """Chart -> series that TensorBoard's own custom-scalars plugin finds for it."""
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(folder)).Reload()
    provider = MultiplexerDataProvider(multiplexer, str(folder))
    plugins: dict[str, Any] = {}
    context = TBContext(data_provider=provider, logdir=str(folder), plugin_name_to_instance=plugins)
    plugins["scalars"] = ScalarsPlugin(context)
    custom = CustomScalarsPlugin(context)
    request, (run,) = RequestContext(), multiplexer.Runs()
    found = {}
    for category in json.loads(custom.layout_impl(request, ""))["category"]:
        for chart in category["chart"]:
            margins = [
                re.escape(tag) + "$" for s in chart.get("margin", {}).get("series", []) for tag in s.values()
            ]
            tags = chart.get("multiline", {}).get("tag", []) + margins
            series = [custom.scalars_impl(request, run, tag, "")["tag_to_events"] for tag in tags]
            assert all(series), chart["title"]
            found[f"{category['title']}: {chart['title']}"] = sum(map(len, series))
    return found


@pytest.mark.smoke
def test_tensorboard_finds_every_series_of_the_ready_made_charts(base: tuple[Run, Path]) -> None:
    from megatron_et.host.tensorboard import layout

    _, folder = base
    found = charts_drawn(folder / "tb")
    for category, charts in layout().items():
        for title, (_, tags) in charts.items():
            # A metric of all layers is one pattern: 60 layers would be one chart too.
            series = len(MOE_LAYERS) if category == "Layer by layer" else len(tags)
            assert found.pop(f"{category}: {title}") == series
    assert not found
    events = EventAccumulator(str(folder / "tb")).Reload()
    target = {e.value for e in events.Scalars("moe/expert_usage_target")}
    assert target == {TARGET}
    (versions,) = events.Tensors(f"{VERSIONS_TEXT}/text_summary")
    assert (
        versions.tensor_proto.string_val[0].decode().startswith(f"megatron_et {__version__}, megatron-core")
    )


@pytest.mark.smoke
def test_resume_is_bitwise(base: tuple[Run, Path], tmp_path: Path) -> None:
    """I4: in new processes, from the checkpoint in the middle of the run: losses, thresholds and weights to
    the bit."""
    straight, folder = base
    flags = f"--load {folder} --ckpt-step 6 --save {tmp_path} --tensorboard-dir {tmp_path}/tb"
    resumed = pretrain(f"{EP2} --train-iters {ITERATIONS} {flags}", folder=tmp_path)
    assert sorted(resumed.trace) == [7, 8, 9, 10]
    for step, record in resumed.trace.items():
        assert record == straight.trace[step]
        assert resumed.grad_norm[step] == straight.grad_norm[step]
    # The second loss that a run prints is the mean of its first two (training_log keeps its sums once).
    assert [resumed.loss[s] for s in (7, 9, 10)] == [straight.loss[s] for s in (7, 9, 10)]
    assert resumed.evaluation == straight.evaluation
    # A start has an event file of its own, and it the charts, once.
    events = EventAccumulator(str(tmp_path / "tb")).Reload()
    assert len(events.Tensors(CONFIG_SUMMARY_TAG)) == 1
    assert_same_tensors(checkpoint_tensors(folder, 10), checkpoint_tensors(tmp_path, 10))


@pytest.mark.smoke
def test_checkpoint_holds_fp32_thresholds_and_counters(base: tuple[Run, Path]) -> None:
    run, folder = base
    tensors = checkpoint_tensors(folder, 10)
    assert router_counters(tensors) == {10}
    thresholds = {k: v for k, v in tensors.items() if k.endswith("router.thresholds.value")}
    assert len(thresholds) == len(MOE_LAYERS)
    assert not any("statistics" in key for key in tensors)
    after_six = checkpoint_tensors(folder, 6)
    logged = run.trace[7]["layers"]["2"]["threshold"]  # those that routed step 7 were committed in step 6
    assert any(after_six[key].tolist() == logged for key in thresholds)


# Runs that compute the same numbers another way, to the bit.
SAME = {
    "recompute-full": "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    "recompute-selective": "--recompute-granularity selective --recompute-modules moe core_attn",
    "grouped-gemm-flag": "--moe-grouped-gemm",
}


@pytest.mark.parametrize("flags", SAME.values(), ids=SAME.keys())
def test_same_numbers_another_way(base: tuple[Run, Path], flags: str, tmp_path: Path) -> None:
    straight, _ = base
    run = forked_pretrain(f"{EP2} --train-iters 6 {flags}", folder=tmp_path)
    assert run.trace == {step: straight.trace[step] for step in range(1, 7)}
    assert {s: run.loss[s] for s in range(1, 7)} == {s: straight.loss[s] for s in range(1, 7)}


# Runs that add the experts' outputs in another order, so that sums differ in their last bits.
REORDERED = {
    "allgather": "--moe-token-dispatcher-type allgather",
    "shared-expert-overlap": "--moe-shared-expert-overlap",
}


@pytest.mark.parametrize("flags", REORDERED.values(), ids=REORDERED.keys())
def test_same_numbers_but_for_the_order_of_sums(base: tuple[Run, Path], flags: str, tmp_path: Path) -> None:
    straight, _ = base
    run = forked_pretrain(f"{EP2} --train-iters 6 {flags}", folder=tmp_path)
    for step in range(1, 7):
        assert float(run.loss[step]) == pytest.approx(float(straight.loss[step]), rel=1e-4)
        for layer, expected in straight.trace[step]["layers"].items():
            assert run.trace[step]["layers"][layer]["cutoff"] == pytest.approx(expected["cutoff"], abs=1e-3)


PRECISIONS = {"bf16": "--bf16", "fp16": "--fp16 --initial-loss-scale 1024"}


@pytest.mark.parametrize("flags", PRECISIONS.values(), ids=PRECISIONS.keys())
def test_half_precision(flags: str, tmp_path: Path) -> None:
    """Through Float16Module; layouts in fp32 are test_layouts.py's."""
    check_healthy(forked_pretrain(f"{EP2} {flags} --train-iters {ITERATIONS}", folder=tmp_path))


@pytest.mark.smoke
def test_a_multi_token_prediction_head_has_thresholds_of_its_own(tmp_path: Path) -> None:
    run = forked_pretrain(f"{EP2} --train-iters 6 --mtp-num-layers 1", folder=tmp_path)
    for step, record in run.trace.items():
        assert list(record["layers"]) == [*MOE_LAYERS, "5"]
        usage = record["layers"]["5"]["usage"]
        assert usage == [TARGET] * 8 if step <= 4 else 1.0 < sum(usage) < 3.2


def test_capacity_anneal_and_fanout_bounds(tmp_path: Path) -> None:
    flags = "--moe-et-capacity-factor 0.5 --moe-et-warmup-anneal-steps 3 --moe-et-max-fanout 3"
    run = forked_pretrain(f"{EP2} --train-iters {ITERATIONS} {flags}", folder=tmp_path)
    phases = [run.trace[step]["phase"] for step in range(1, ITERATIONS + 1)]
    assert phases == ["warmup"] * 4 + ["anneal"] * 3 + ["threshold"] * 3
    for record in run.trace.values():
        for layer in record["layers"].values():
            assert sum(layer["fanout_histogram"][4:]) == 0
            assert max(layer["usage"]) <= 1.5 * TARGET


def test_expert_choice_trains_on_target_and_evaluates_by_thresholds(tmp_path: Path) -> None:
    expert_choice = ["--moe-router-type", "expert-choice"]
    run = forked_pretrain(f"{EP2} --train-iters 6", folder=tmp_path, et=expert_choice)
    for record in run.trace.values():
        for layer in record["layers"].values():
            assert layer["usage"] == [TARGET] * 8
    assert float(run.evaluation[0]) < float(run.loss[1])


@pytest.mark.smoke
def test_topk_is_plain_megatron_to_the_bit(tmp_path: Path) -> None:
    """--moe-router-type topk (and leaving it out): the same script with and without our launcher."""
    baseline = "--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0.01 "
    flags = f"{EP2} {baseline} --train-iters 6 --save {tmp_path}/"
    from megatron_et.run.cpu import CPU_ARGS

    script = str(HERE / "plain_pretrain.py")
    plain = pretrain([*CPU_ARGS, *f"{flags}plain".split()], command=(script,), et=[])
    ours = pretrain(f"{flags}ours", command=("-m", "megatron_et", script), et=["--moe-router-type", "topk"])
    assert plain.loss == ours.loss
    assert plain.grad_norm == ours.grad_norm
    assert_same_tensors(checkpoint_tensors(tmp_path / "plain", 6), checkpoint_tensors(tmp_path / "ours", 6))


@pytest.mark.smoke
def test_a_topk_checkpoint_explains_itself_and_starts_the_warmup(tmp_path: Path) -> None:
    topk = forked_pretrain(f"{EP2} --train-iters 6 --save {tmp_path}/topk", et=[])
    et = forked_pretrain(
        f"{EP2} --train-iters {ITERATIONS} --load {tmp_path}/topk --save {tmp_path}/et", folder=tmp_path
    )
    assert et.output.count("holds no thresholds: they start fresh, and the warm-up of 4 global batches") == 1
    assert [et.trace[step]["phase"] for step in range(7, 11)] == ["warmup"] * 4
    assert all(et.trace[7]["layers"][n]["threshold"] == [None] * 8 for n in MOE_LAYERS)
    # The weights were taken over: the loss goes on near where top-k left it, not at the start.
    assert float(et.loss[7]) < (float(topk.loss[1]) + float(topk.loss[6])) / 2

    # Loading it again is an ordinary resume, and top-k can take it back.
    again = forked_pretrain(f"{EP2} --train-iters 12 --load {tmp_path}/et", folder=tmp_path / "again")
    assert "holds no thresholds" not in again.output
    assert again.trace[11]["phase"] == "threshold"
    back = forked_pretrain(f"{EP2} --train-iters 12 --load {tmp_path}/et", et=[])
    assert float(back.loss[11]) < float(topk.loss[1])


@pytest.mark.smoke
def test_use_checkpoint_args_takes_the_routing_along(base: tuple[Run, Path], tmp_path: Path) -> None:
    _, folder = base
    run = pretrain(
        f"{EP2} --train-iters 12 --load {folder} --use-checkpoint-args --moe-et-trace-dir {tmp_path}",
        folder=tmp_path,
        et=[],
    )
    assert run.trace[11]["phase"] == "threshold"
    assert "EMA decay 0.9" in run.output


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize("check", ["", "--no-check-for-nan-in-loss-and-grad"])
def test_nonfinite_logits_stop_the_run_naming_layer_and_batch(value: str, check: str) -> None:
    """Whether Megatron's own check of the loss stops the step first or is switched off."""
    run = pretrain(
        f"{EP2} --train-iters 6 {check}",
        command=("-m", "megatron_et", str(HERE / "poisoned_pretrain.py")),
        env={"POISON": value},
        succeeds=False,
    )
    assert run.status != 0
    assert sorted(run.loss) == [1, 2]
    message = re.search(r"NonFiniteLogitsError: (.*)", run.output)
    assert message, run.output[-3000:]
    assert "router logits of layer 3 were NaN or infinite in global batch 3" in message.group(1)


BAD_INPUT = {
    "unknown-router": (
        "--moe-router-type expert-treshold",
        "argument --moe-router-type: invalid choice: 'expert-treshold'",
    ),
    "wrong-flag": ("--moe-et-ema-decays 0.9", "unrecognized arguments: --moe-et-ema-decays 0.9"),
    "bad-value": ("--moe-et-ema-decay 1.5", "--moe-et-ema-decay is 1.5: it must be in [0, 1)"),
    "refused": (
        "--moe-router-enable-expert-bias --moe-router-score-function sigmoid",
        "--moe-router-enable-expert-bias cannot be combined with Expert Threshold routing",
    ),
    "explicit-softmax": (
        "--moe-router-score-function softmax",
        "Expert Threshold routing needs 'sigmoid'",
    ),
    "no-data": (
        "--data-path /nowhere/corpus",
        "dataset file not found: /nowhere/corpus.bin, /nowhere/corpus.idx",
    ),
    "tiny-pool": (
        "--micro-batch-size 1 --seq-length 2 --max-position-embeddings 2 --num-experts 8",
        "a micro-batch has 2 tokens on a rank",
    ),
}


@pytest.mark.parametrize(("flags", "sentence"), BAD_INPUT.values(), ids=BAD_INPUT.keys())
def test_bad_input_is_one_clear_sentence(flags: str, sentence: str) -> None:
    model = [word for word in GPT_ARGS if not (word == "--mock-data" and "--data-path" in flags)]
    run = pretrain(f"--train-iters 2 {flags}", processes=1, model=model, succeeds=False, timeout=90)
    assert run.status != 0
    assert sentence in run.output, run.output[-3000:]
    # torchrun prints a traceback of its own; ours must not add one.
    assert "validate_args" not in run.output


def test_a_split_without_a_token_is_an_error_and_no_hang(tmp_path: Path) -> None:
    """One document leaves none for validation: Megatron would count epochs of nothing for ever."""
    text, prefix = tmp_path / "text.txt", tmp_path / "data"
    text.write_text("A single short document. " * 40)
    tokenizer = train_tokenizer([text], tmp_path / "tokenizer", 300)
    write_dataset([text], prefix, tokenizer)
    model = [word for word in GPT_ARGS if word != "--mock-data"]
    data = ["--data-path", str(prefix), "--tokenizer-model", str(tokenizer)]
    data += ["--tokenizer-type", "SentencePieceTokenizer"]
    run = pretrain([*data, "--train-iters", "2"], processes=1, model=model, succeeds=False, timeout=90)
    assert run.status != 0
    assert f"the valid split of {prefix} holds no token: it got 0 of" in run.output, run.output[-3000:]


def test_a_corrupt_checkpoint_is_an_error_and_no_hang(base: tuple[Run, Path], tmp_path: Path) -> None:
    import shutil

    _, folder = base
    copy = tmp_path / "corrupt"
    shutil.copytree(folder / "iter_0000006", copy / "iter_0000006")
    (copy / "latest_checkpointed_iteration.txt").write_text("6")
    for shard in (copy / "iter_0000006").glob("*.distcp"):
        shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    run = pretrain(f"{EP2} --train-iters 8 --load {copy}", succeeds=False, timeout=120)
    assert run.status != 0
    assert not run.loss
    assert "Error" in run.output
