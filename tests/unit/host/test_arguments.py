"""The seam of Megatron's arguments: our flags, their checks against Megatron's, and what a user reads.

The functions run here on Megatron's real parser. What needs the seam bound runs in one new process, on the
CPU backend: binding changes Megatron for good.
"""

import argparse
import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from megatron_et.config import ConfigError, ExpertThresholdConfig, choices, dest_of, flag_of
from megatron_et.host import arguments
from megatron_et.host.arguments import (
    add_arguments,
    check_counts,
    check_padding,
    check_pool,
    endless_warmup,
    explicit_names,
    mend_help,
    prepare,
    refuse_yaml,
    take_over,
)
from tests.megatron_here import needs_training

# Megatron says at every import what is not installed.
pytestmark = [
    pytest.mark.filterwarnings(r"ignore::UserWarning:megatron\."),
    needs_training,
    pytest.mark.smoke,
]

FLAGS = [
    "--moe-router-type",
    "--moe-et-ema-decay",
    "--moe-et-warmup-steps",
    "--moe-et-warmup-anneal-steps",
    "--moe-et-capacity-factor",
    "--moe-et-pool",
    "--moe-et-guard",
    "--moe-et-max-fanout",
    "--moe-et-gate-normalization",
    "--moe-et-kernels",
    "--moe-et-trace-dir",
]
MOE = "--num-experts 8 --moe-router-topk 2"
ET = f"{MOE} --moe-router-type expert-threshold"


@cache
def _parser() -> argparse.ArgumentParser:
    """Megatron's parser with our flags; importing it takes seconds, so once."""
    from megatron.training.arguments import add_megatron_arguments

    return add_arguments(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))


def parse(line: str = "") -> argparse.Namespace:
    return _parser().parse_args(line.split())


def prepared(line: str) -> tuple[argparse.Namespace, ExpertThresholdConfig]:
    """Arguments and settings after our checks of a command line."""
    args = parse(line)
    return args, prepare(args, explicit_names(line.split()))


@pytest.fixture(autouse=True)
def _rank_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)


# --- flags ---


def test_every_flag_is_in_megatrons_parser_once() -> None:
    ours = [a for a in _parser()._actions if set(a.option_strings) & set(FLAGS)]
    assert [action.option_strings for action in ours] == [[flag] for flag in FLAGS]
    assert [flag_of(knob.name) for knob in fields(ExpertThresholdConfig)] == FLAGS


def test_no_flag_given_is_the_default_config() -> None:
    args = parse()
    assert ExpertThresholdConfig.from_args(args) == ExpertThresholdConfig()
    assert (args.moe_router_type, args.moe_et_ema_decay, args.moe_et_warmup_steps) == ("topk", 0.999, 4000)
    assert args.moe_et_capacity_factor is None
    # Arguments are pickled into checkpoints, which must open without this package.
    plain = (str, int, float, type(None))
    assert all(type(getattr(args, dest_of(knob.name))) in plain for knob in fields(ExpertThresholdConfig))


def test_values_arrive_in_the_config_with_their_types() -> None:
    args = parse(
        "--moe-router-type expert-threshold --moe-et-ema-decay 0.99 --moe-et-warmup-steps 10 "
        "--moe-et-warmup-anneal-steps=5 --moe-et-capacity-factor 1 --moe-et-pool microbatch "
        "--moe-et-max-fanout 4 --moe-et-gate-normalization fanout "
        "--moe-et-kernels triton --moe-et-trace-dir traces"
    )
    config = ExpertThresholdConfig.from_args(args)
    assert config == ExpertThresholdConfig(
        router_type="expert-threshold",
        ema_decay=0.99,
        warmup_steps=10,
        warmup_anneal_steps=5,
        capacity_factor=1.0,
        pool="microbatch",
        max_fanout=4,
        gate_normalization="fanout",
        kernels="triton",
        trace_dir="traces",
    )
    assert type(config.capacity_factor) is float
    assert type(config.warmup_steps) is type(config.max_fanout) is int


@pytest.mark.parametrize(
    "words",
    [
        "--moe-router-type expert_threshold",
        "--moe-et-pool planet",
        "--moe-et-gate-normalization softmax",
        "--moe-et-warmup-steps 1.5",
        "--moe-et-max-fanout two",
        "--moe-et-ema-decay high",
    ],
)
def test_wrong_choices_and_types_stop_in_the_parser(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(words)
    assert stop.value.code == 2
    flag, value = words.split()
    error = capsys.readouterr().err
    assert f"argument {flag}: invalid" in error
    assert value in error
    assert all(choice in error for choice in choices(next(n for n in _names() if flag_of(n) == flag)))


def _names() -> list[str]:
    return [knob.name for knob in fields(ExpertThresholdConfig)]


def test_help_shows_every_flag_with_meaning_choices_and_default() -> None:
    text = add_arguments(argparse.ArgumentParser(prog="x")).format_help()
    _, title, group = text.partition("expert threshold routing (megatron_et):")
    assert title
    entries = group.split("\n  --")[1:]
    assert ["--" + entry.split()[0] for entry in entries] == FLAGS
    for entry, knob in zip(entries, fields(ExpertThresholdConfig), strict=True):
        words = " ".join(entry.split())
        assert f"(default: {knob.default})" in words
        # argparse breaks lines at hyphens.
        assert knob.metadata["help"].replace(" ", "") in words.replace(" ", "")
        allowed = choices(knob.name)
        assert not allowed or "{" + ",".join(allowed) + "}" in entry


def test_help_with_a_bare_percent_sign_is_mended() -> None:
    """Megatron 0.19.2 has one, at which argparse fails for every --help."""
    parser = argparse.ArgumentParser(prog="x")
    parser.add_argument("--bare", default=7, help="(e.g. 1.10 = 10%).")
    parser.add_argument("--right", default=7, help="100%% of %(default)s")
    parser.add_argument("--silent", help=argparse.SUPPRESS)
    mend_help(parser)
    text = parser.format_help()
    assert "(e.g. 1.10 = 10%)." in text
    assert "100% of 7" in text
    assert "silent" not in text


def test_help_that_names_the_program_is_left() -> None:
    parser = argparse.ArgumentParser(prog="train.py")
    parser.add_argument("--config", help="%(prog)s reads it")
    mend_help(parser)
    assert "train.py reads it" in parser.format_help()


# --- what the user typed ---


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ([], set()),
        (["--moe-et-ema-decay", "0.9"], {"moe_et_ema_decay"}),
        (["--moe-et-ema-decay=0.9"], {"moe_et_ema_decay"}),
        (["--moe-et-trace-dir=a=b--c"], {"moe_et_trace_dir"}),
        (["--bf16", "--lr", "-1", "words", "--lr=2"], {"bf16", "lr"}),
        (["-h"], set()),
    ],
)
def test_explicit_names(words: list[str], names: set[str]) -> None:
    assert explicit_names(words) == names


# --- prepare ---


@pytest.mark.parametrize("router", ["", "--moe-router-type topk", "--moe-router-type=topk"])
def test_topk_leaves_the_arguments_untouched_and_says_nothing(
    router: str, capsys: pytest.CaptureFixture[str]
) -> None:
    # Settings that ET would change or refuse.
    line = f"{MOE} {router} --moe-aux-loss-coeff 0.01 --moe-router-pre-softmax --moe-router-fusion"
    args, et = prepared(line)
    assert not et.active
    assert vars(args) == vars(parse(line))
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("--moe-et-ema-decay 0.9", "--moe-et-ema-decay has no effect"),
        (
            "--moe-et-ema-decay=0.999",
            "--moe-et-ema-decay has no effect",
        ),  # at its default, typed all the same
        (
            "--moe-router-type topk --moe-et-trace-dir t --moe-et-capacity-factor 1",
            "--moe-et-capacity-factor, --moe-et-trace-dir has no effect",
        ),
    ],
)
def test_our_flags_without_our_router_are_refused(words: str, named: str) -> None:
    with pytest.raises(ConfigError) as error:
        prepared(f"{MOE} {words}")
    assert str(error.value).startswith(f"{named} with --moe-router-type topk: add --moe-router-type ")


def test_one_line_says_what_will_run_and_what_was_set(capsys: pytest.CaptureFixture[str]) -> None:
    args, et = prepared(f"{ET} --moe-router-dtype fp32 --moe-et-warmup-steps 7")
    assert et.active
    output, error = capsys.readouterr()
    assert error == ""
    assert output == (
        "[megatron_et] --moe-router-type expert-threshold: target mean fan-out 2 of 8 experts (rate 0.2500), "
        "warm-up 7 global batches, EMA decay 0.999; set moe_router_score_function=sigmoid, "
        "moe_router_load_balancing_type=none\n"
    )
    assert (args.moe_router_score_function, args.moe_router_load_balancing_type) == ("sigmoid", "none")
    untouched = {"moe_router_score_function", "moe_router_load_balancing_type"}
    plain = vars(parse(f"{ET} --moe-router-dtype fp32 --moe-et-warmup-steps 7"))
    assert {k for k, v in vars(args).items() if v != plain[k]} == untouched


def test_deepeps_bound_on_the_fanout_is_set_and_said(capsys: pytest.CaptureFixture[str]) -> None:
    line = f"{ET} --num-experts 64 --moe-token-dispatcher-type flex"
    args, et = prepared(line)
    assert args.moe_et_max_fanout == et.max_fanout == 32
    assert "moe_et_max_fanout=32 (DeepEP has 32 slots a token)" in capsys.readouterr().out
    args, et = prepared(f"{line} --moe-et-max-fanout 20")
    assert args.moe_et_max_fanout == et.max_fanout == 20
    assert "moe_et_max_fanout" not in capsys.readouterr().out


def test_nothing_set_is_not_mentioned(capsys: pytest.CaptureFixture[str]) -> None:
    needed = "--moe-router-score-function sigmoid --moe-router-load-balancing-type none"
    prepared(f"{ET} --moe-router-dtype=fp32 {needed}")
    output = capsys.readouterr().out
    assert output.count("\n") == 1
    assert output.endswith("EMA decay 0.999\n")


def test_only_rank_zero_says_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "3")
    args, _ = prepared(ET)
    assert capsys.readouterr() == ("", "")
    assert args.moe_router_score_function == "sigmoid"  # set on every rank


@pytest.mark.parametrize(
    "flag",
    ["--moe-router-score-function softmax", "--moe-router-score-function=softmax"],
)
def test_megatrons_default_typed_by_the_user_is_refused(flag: str) -> None:
    with pytest.raises(ConfigError, match="--moe-router-score-function is 'softmax'"):
        prepared(f"{ET} {flag}")


def test_a_value_out_of_range_names_its_flag() -> None:
    with pytest.raises(ConfigError, match=r"--moe-et-ema-decay is 1\.0"):
        prepared(f"{ET} --moe-et-ema-decay 1")


@pytest.mark.parametrize("yaml", ["--yaml-cfg run.yaml", "--yaml-cfg=run.yaml"])
def test_yaml_beside_our_flags_is_refused(yaml: str) -> None:
    for ours in ("--moe-router-type expert-threshold", "--moe-et-ema-decay=0.9"):
        with pytest.raises(ConfigError, match="--yaml-cfg cannot be combined"):
            refuse_yaml(f"{yaml} {ours}".split())
        refuse_yaml(ours.split())
    # Users of YAML without us are none of our business.
    refuse_yaml(f"{yaml} --num-experts 8 --moe-router-topk 2".split())


# --- the warm-up ---


@pytest.mark.parametrize(
    ("flags", "endless"),
    [
        ("--train-iters 100 --moe-et-warmup-steps 100", "trained by Expert Choice"),
        ("--train-iters 101 --moe-et-warmup-steps 100", None),
        (
            "--train-iters 101 --moe-et-warmup-steps 100 --moe-et-warmup-anneal-steps 1",
            "a capacity bound stays",
        ),
        ("--train-iters 100", "trained by Expert Choice"),  # the default of 4,000
        ("--train-samples 100", None),  # how many steps these are is not known yet
        ("--train-iters 100 --moe-router-type expert-choice", None),
    ],
)
def test_a_warmup_that_never_ends_is_said(flags: str, endless: str | None) -> None:
    args = parse(f"{ET} {flags}")
    sentence = endless_warmup(args, ExpertThresholdConfig.from_args(args))
    assert (sentence is None) == (endless is None)
    if endless is not None:
        assert sentence is not None
        assert endless in sentence
        assert "the run ends after 10" in sentence


def test_optional_numbers_can_be_switched_off() -> None:
    line = f"{ET} --moe-et-guard none --moe-et-capacity-factor none --moe-et-max-fanout none"
    et = ExpertThresholdConfig.from_args(parse(line))
    assert (et.guard, et.capacity_factor, et.max_fanout) == (None, None, None)
    assert ExpertThresholdConfig.from_args(parse(f"{ET} --moe-et-guard 0.5")).guard == 0.5


def test_a_checkpoints_guard_can_be_switched_off() -> None:
    saved = parse(f"{ET} --moe-et-guard 0.5")
    for line, guard in (
        (ET, 0.5),
        (f"{ET} --moe-et-guard none", None),
    ):
        args = parse(line)
        take_over(args, saved, explicit_names(line.split()))
        assert ExpertThresholdConfig.from_args(args).guard == guard


# --- the routing pool ---

SP = "--sequence-parallel"


def pool_of(line: str, data_parallel_size: int = 1) -> str | None:
    """What check_pool says of a command line, None when the pool is large enough."""
    args = parse(line)
    args.data_parallel_size = data_parallel_size  # Megatron's validate_args derives it
    try:
        check_pool(args, ExpertThresholdConfig.from_args(args))
    except ConfigError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("layout", "tokens", "enough"),
    [
        # 8 experts / fan-out 2: an expert gets one token of every four.
        ("--micro-batch-size 1 --seq-length 4", 4, True),
        ("--micro-batch-size 1 --seq-length 3", 3, False),
        ("--micro-batch-size 2 --seq-length 2", 4, True),
        ("--micro-batch-size 1 --seq-length 16 --context-parallel-size 4", 4, True),
        ("--micro-batch-size 1 --seq-length 16 --context-parallel-size 8", 2, False),
        ("--micro-batch-size 1 --seq-length 8 --tensor-model-parallel-size 8", 8, True),
        (f"--micro-batch-size 1 --seq-length 16 --tensor-model-parallel-size 4 {SP}", 4, True),
        (f"--micro-batch-size 1 --seq-length 16 --tensor-model-parallel-size 8 {SP}", 2, False),
        (
            "--micro-batch-size 4 --seq-length 16 --context-parallel-size 4 --tensor-model-parallel-size 8 "
            + SP,
            2,
            False,
        ),
        ("--micro-batch-size 1 --seq-length 4 --pipeline-model-parallel-size 8", 4, True),
    ],
)
def test_a_pool_without_a_token_for_every_expert_is_refused(layout: str, tokens: int, enough: bool) -> None:
    """The pool of a rank: other data-parallel ranks hold pools of their own."""
    said = pool_of(f"{ET} {layout}", data_parallel_size=64)
    if enough:
        assert said is None
    else:
        assert said is not None
        assert said.startswith(f"a micro-batch has {tokens} tokens on a rank (")


@pytest.mark.parametrize(("data_parallel_size", "enough"), [(1, False), (2, True)])
def test_a_global_pool_is_that_of_all_ranks(data_parallel_size: int, enough: bool) -> None:
    """Context- and sequence-parallel ranks hold parts of the same sequences, data-parallel ranks others."""
    line = f"{ET} --moe-et-pool global --micro-batch-size 1 --seq-length 2"
    line += f" --context-parallel-size 2 --tensor-model-parallel-size 2 {SP}"
    said = pool_of(line, data_parallel_size)
    assert (said is None) == enough
    assert enough or "a micro-batch has 2 tokens on all ranks together" in str(said)


@pytest.mark.parametrize(("batch", "length"), [(2**20, 2048), (2**31, 1)])
def test_a_global_batch_of_2_to_the_31_tokens_is_refused(batch: int, length: int) -> None:
    """I7: its counts would overflow; one token less is counted."""
    with pytest.raises(ConfigError, match=f"a global batch has {2**31} tokens"):
        check_counts(argparse.Namespace(global_batch_size=batch, seq_length=length))
    check_counts(argparse.Namespace(global_batch_size=batch - 1, seq_length=length))


PAD = f"{ET} --moe-router-padding-for-quantization --micro-batch-size 1 --seq-length"


@pytest.mark.parametrize(
    ("line", "rows", "tokens"),
    [
        (f"{PAD} 48", 16, None),
        (f"{PAD} 56", 16, 56),
        (f"{PAD} 48 --fp8-format e4m3 --fp8-recipe mxfp8", 32, 48),
        (f"{PAD} 64 --fp8-format e4m3 --fp8-recipe mxfp8", 32, None),
        (f"{PAD} 48 --micro-batch-size 2 --context-parallel-size 4", 16, 24),
        (f"{PAD} 96 --tensor-model-parallel-size 4", 16, None),
        (f"{PAD} 96 --tensor-model-parallel-size 4 {SP}", 16, 24),
        (f"{ET} --micro-batch-size 1 --seq-length 56", 16, None),
    ],
)
def test_a_map_that_cannot_be_padded_is_refused(line: str, rows: int, tokens: int | None) -> None:
    args = parse(line)
    if tokens is None:
        check_padding(args)
        return
    with pytest.raises(ConfigError, match=rf"a multiple of {rows}, and a micro-batch has {tokens} tokens"):
        check_padding(args)


def test_the_pool_is_measured_against_experts_and_fanout() -> None:
    sizes = "--moe-router-type expert-threshold --micro-batch-size 1 --seq-length 21 --moe-router-topk 3"
    assert pool_of(f"{sizes} --num-experts 63") is None
    said = pool_of(f"{sizes} --num-experts 64")
    assert "fewer than --num-experts 64 / --moe-router-topk 3" in str(said)


# --- --use-checkpoint-args ---


def saved_args() -> argparse.Namespace:
    return parse(
        f"{ET} --moe-et-ema-decay 0.5 --moe-et-warmup-steps 9 --moe-et-max-fanout 3 --moe-et-trace-dir old"
    )


def test_routing_comes_from_the_checkpoint() -> None:
    args = parse(MOE)
    take_over(args, saved_args(), set())
    assert ExpertThresholdConfig.from_args(args) == ExpertThresholdConfig(
        router_type="expert-threshold", ema_decay=0.5, warmup_steps=9, max_fanout=3, trace_dir=None
    )


def test_the_command_line_wins_over_the_checkpoint() -> None:
    line = "--moe-et-ema-decay=0.999 --moe-et-trace-dir new"
    args = parse(line)
    take_over(args, saved_args(), explicit_names(line.split()))
    config = ExpertThresholdConfig.from_args(args)
    assert (config.ema_decay, config.warmup_steps, config.trace_dir) == (0.999, 9, "new")
    back_to_topk = parse("--moe-router-type topk")
    take_over(back_to_topk, saved_args(), {"moe_router_type"})
    assert prepare(back_to_topk, {"moe_router_type"}).active is False


def test_another_router_than_the_checkpoints_can_be_asked_for() -> None:
    saved = parse(f"{ET} --moe-et-capacity-factor 0.5 --moe-et-warmup-anneal-steps 3")
    line = f"{MOE} --moe-router-type expert-choice"
    args = parse(line)
    take_over(args, saved, explicit_names(line.split()))
    assert prepare(args, explicit_names(line.split())).router_type == "expert-choice"


def test_a_checkpoint_of_plain_megatron_changes_nothing() -> None:
    plain = saved_args()
    for knob in fields(ExpertThresholdConfig):
        delattr(plain, dest_of(knob.name))
    args = parse(f"{ET} --moe-et-warmup-steps 4")
    before = copy.copy(vars(args))
    take_over(args, plain, set())
    assert vars(args) == before


def test_the_seam_takes_over_only_what_was_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "--moe-et-ema-decay=0.75"])
    args = parse("--moe-et-ema-decay=0.75")

    # Megatron returns the arguments alone where there is no checkpoint, else the checkpoint's beside them.
    nothing_found = arguments._load_args_from_checkpoint(lambda args, **_: args)
    assert nothing_found(args, load_arg="pretrained_checkpoint") is args
    assert args.moe_router_type == "topk"
    found = (args, saved_args())
    assert arguments._load_args_from_checkpoint(lambda *_: found)(args) is found
    assert (args.moe_router_type, args.moe_et_warmup_steps, args.moe_et_ema_decay) == (
        "expert-threshold",
        9,
        0.75,
    )


# --- validate_args ---


def validate(
    monkeypatch: pytest.MonkeyPatch, line: str, original: Callable[..., Any] = lambda *_, **__: None
) -> argparse.Namespace:
    """Our validate_args around a stand-in for Megatron's."""
    args = parse(line)
    args.global_batch_size = 1  # Megatron's validate_args has a default for it
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *line.split()])
    arguments._validate_args(original)(args)
    return args


def test_a_refusal_is_exit_status_2_and_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reached: list[str] = []
    with pytest.raises(SystemExit) as stop:
        validate(monkeypatch, f"{ET} --moe-router-fusion", lambda *_: reached.append("Megatron"))
    assert stop.value.code == 2
    output, error = capsys.readouterr()
    assert output == ""
    assert error == (
        "megatron_et: --moe-router-fusion cannot be combined with Expert Threshold routing: Transformer "
        "Engine's fused router computes a top-k. Remedy: leave it out.\n"
    )
    # Megatron's own checks would only add noise, some of it about the refused flag.
    assert not reached


def test_other_ranks_stop_silently(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as stop:
        validate(monkeypatch, f"{ET} --moe-router-fusion")
    assert stop.value.code == 2
    assert capsys.readouterr() == ("", "")


def test_the_pool_is_checked_with_the_sizes_that_megatron_settled(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def megatron(args: argparse.Namespace, *_: Any) -> None:
        args.context_parallel_size = 4

    line = f"{ET} --micro-batch-size 1 --seq-length 8"
    validate(monkeypatch, line)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        validate(monkeypatch, line, megatron)
    assert stop.value.code == 2
    assert "megatron_et: a micro-batch has 2 tokens on a rank" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        validate(
            monkeypatch, f"{ET} --moe-router-padding-for-quantization --micro-batch-size 1 --seq-length 8"
        )
    assert "--moe-router-padding-for-quantization pads" in capsys.readouterr().err
    # Top-k has no pool.
    validate(monkeypatch, line.replace("expert-threshold", "topk"), megatron)


def test_megatrons_own_refusals_and_its_answer_pass_through(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("Megatron's reason")

    with pytest.raises(AssertionError, match="Megatron's reason"):
        validate(monkeypatch, ET, refuse)
    args = parse(MOE)
    monkeypatch.setattr(sys, "argv", ["pretrain.py"])
    passed_on = arguments._validate_args(lambda *args, **kwargs: (args, kwargs))
    assert passed_on(args, {"a": 1}, key="b") == ((args, {"a": 1}), {"key": "b"})


# --- the seam bound in Megatron ---

# Parses and validates each command line as pretrain() does, first one without us; prints one JSON object.
BOUND = """
import contextlib, io, json, os, sys
from megatron_et.run import cpu
cpu.install()
import megatron.training.arguments as megatron

BASE = '''--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 64 --micro-batch-size 1
    --max-position-embeddings 64 --num-experts 8 --moe-router-topk 2 --mock-data --lr 1e-3 --train-iters 2
    --tokenizer-type NullTokenizer --vocab-size 128'''.split()

def parse_and_validate():
    args = megatron.parse_args()
    megatron.validate_args(args, {})
    return args

def run(line, entry=parse_and_validate, rank="0"):
    sys.argv = ["pretrain.py", *cpu.CPU_ARGS, *BASE, *line.split()]
    os.environ["RANK"] = rank
    os.environ["WORLD_SIZE"] = "2"
    output, error, status, args = io.StringIO(), io.StringIO(), 0, None
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(error):
        try:
            args = entry()
        except SystemExit as stop:
            status = stop.code
        except Exception as problem:
            status = repr(problem)
    said = [x for x in output.getvalue().splitlines() if "megatron_et" in x]
    return args, {"status": status, "said": said, "error": error.getvalue()}

lines = json.loads(sys.argv[1])
plain, _ = run("")
import megatron_et
megatron_et.install()
topk, _ = run("--moe-router-type topk")
answers = {
    "new": sorted(vars(topk).keys() - vars(plain).keys()),
    "moved": [k for k, v in vars(plain).items() if repr(getattr(topk, k, None)) != repr(v)],
    # Only this entry knows of YAML.
    "yaml": run(lines.pop("yaml"), getattr(megatron, "parse_and_validate_args", parse_and_validate))[1],
}
for name, line in lines.items():
    args, answers[name] = run(line, rank="1" if name.endswith("rank 1") else "0")
    if name == "good":
        config = megatron.core_transformer_config_from_args(args)
        names = ("moe_router_score_function", "moe_router_dtype", "moe_router_load_balancing_type")
        answers[name]["config"] = [getattr(config, name) for name in names]
print("ANSWERS" + json.dumps(answers))
"""

LINES = {
    "good": "--moe-router-type expert-threshold --moe-et-warmup-steps 1",
    "refused": "--moe-router-type=expert-threshold --moe-router-pre-softmax",
    "refused, rank 1": "--moe-router-type=expert-threshold --moe-router-pre-softmax",
    "orphan": "--moe-et-ema-decay=0.9",
    "tiny pool": "--moe-router-type expert-threshold --seq-length 2 --max-position-embeddings 2",
    "old graph": "--moe-router-type expert-threshold --enable-cuda-graph",
    "old graph, external": "--moe-router-type expert-threshold --external-cuda-graph",
    "yaml": "--moe-router-type expert-threshold --yaml-cfg {yaml}",
}
# The least that Megatron 0.19.2 reads from a YAML configuration before it validates it.
YAML = "disable_msc_deprecated: false\nenable_msc: false\nuse_checkpoint_args: false\ndata_path: null\n"


@pytest.fixture(scope="module")
def bound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Name -> what parsing and validating its line in LINES came to, the seam bound."""
    yaml = tmp_path_factory.mktemp("yaml") / "run.yaml"
    yaml.write_text(YAML)
    lines = {name: line.format(yaml=yaml) for name, line in LINES.items()}
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", BOUND, json.dumps(lines)],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.rpartition("ANSWERS")[2])


def test_megatron_settles_on_what_et_needs(bound: dict[str, Any]) -> None:
    good = bound["good"]
    assert (good["status"], good["error"]) == (0, "")
    assert good["config"] == ["sigmoid", "fp32", "none"]
    assert len([line for line in good["said"] if line.startswith("[megatron_et]")]) == 1


def test_topk_settles_as_without_us(bound: dict[str, Any]) -> None:
    assert bound["new"] == sorted(dest_of(knob.name) for knob in fields(ExpertThresholdConfig))
    assert bound["moved"] == []


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("refused", "megatron_et: --moe-router-pre-softmax cannot be combined with Expert Threshold"),
        ("orphan", "megatron_et: --moe-et-ema-decay has no effect with --moe-router-type topk"),
        ("tiny pool", "megatron_et: a micro-batch has 2 tokens on a rank"),
    ],
)
def test_bound_refusals_stop_the_job(bound: dict[str, Any], name: str, sentence: str) -> None:
    assert bound[name]["status"] == 2
    assert bound[name]["error"].startswith(sentence)
    assert bound[name]["error"].count("\n") == 1


def test_bound_refusals_are_read_once(bound: dict[str, Any]) -> None:
    assert bound["refused, rank 1"] == {"status": 2, "said": [], "error": ""}


@pytest.mark.parametrize("name", ["old graph", "old graph, external"])
def test_old_spellings_of_cuda_graphs_are_refused_at_startup(bound: dict[str, Any], name: str) -> None:
    assert bound[name]["status"] == 2
    assert "cuda-graph" in bound[name]["error"]


def test_yaml_configurations_are_refused(bound: dict[str, Any]) -> None:
    assert bound["yaml"]["status"] == 2
    assert "--yaml-cfg cannot be combined" in bound["yaml"]["error"]
