"""Seam: Megatron's arguments. Flags come from ExpertThresholdConfig; refusals and defaults from
compatibility.py."""

import argparse
import importlib
import sys
from collections.abc import Callable
from dataclasses import Field, fields
from typing import Any

from megatron_et.config import (
    ConfigError,
    ExpertThresholdConfig,
    choices,
    dest_of,
    flag_of,
    scalar_type,
)
from megatron_et.host import seam
from megatron_et.moe import compatibility
from megatron_et.moe.compatibility import Refusal
from megatron_et.moe.settings import bounded, read_arguments_with
from megatron_et.rank_zero import is_rank_zero, say
from megatron_et.rule.quantile import expected_load

YAML = Refusal(
    "--yaml-cfg",
    lambda args: getattr(args, "yaml_cfg", None),
    "Megatron then drops every flag of the command line, this package's too",
    "give the settings as flags",
)
"""Asked about before Megatron parses: with it, nothing of ours is left to ask about later."""


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add one argument group with a flag for every field of ExpertThresholdConfig."""
    group = parser.add_argument_group("expert threshold routing (megatron_et)")
    for knob in fields(ExpertThresholdConfig):
        group.add_argument(
            flag_of(knob.name),
            type=_parser_of(knob),
            default=knob.default,
            choices=choices(knob.name) or None,
            help=f"{knob.metadata['help']} (default: {knob.default})".replace("%", "%%"),
        )
    return parser


def _parser_of(knob: Field[Any]) -> Callable[[str], Any]:
    """What argparse calls on a value. An optional number also takes `none`, so that a setting that came with
    --use-checkpoint-args or from a script's defaults can be switched off."""
    scalar = scalar_type(knob.name)
    if scalar is str or knob.default is not None:
        return scalar

    def parse(text: str) -> Any:
        return None if text == "none" else scalar(text)

    parse.__name__ = scalar.__name__  # what argparse calls a value that does not parse
    return parse


def explicit_names(argv: list[str]) -> set[str]:
    """Attribute names of the flags on a command line (Megatron allows no abbreviations)."""
    flags = (word.partition("=")[0] for word in argv if word.startswith("--"))
    return {flag.removeprefix("--").replace("-", "_") for flag in flags}


def settle(args: argparse.Namespace, explicit: set[str]) -> tuple[ExpertThresholdConfig, list[str]]:
    """Validate our flags against Megatron's before Megatron validates its own, and set what ET needs.

    Returns:
        our settings, and a text `name=value` for everything that was set.

    Raises:
        ConfigError: everything that is wrong, each with its remedy.
    """
    et = ExpertThresholdConfig.from_args(args)
    if not et.active:
        orphans = sorted(name for name in explicit if name.startswith("moe_et_"))
        if orphans:
            given = ", ".join("--" + name.replace("_", "-") for name in orphans)
            raise ConfigError(
                f"{given} has no effect with --moe-router-type topk: add --moe-router-type "
                "expert-threshold, or leave it out."
            )
        return et, []
    changed = compatibility.check(args, et, explicit)
    et = bounded(et, args)
    args.moe_et_max_fanout = et.max_fanout
    return et, changed


def prepare(args: argparse.Namespace, explicit: set[str]) -> ExpertThresholdConfig:
    """`settle`, and say once what will run and what was set.

    Raises:
        ConfigError: everything that is wrong, each with its remedy.
    """
    et, changed = settle(args, explicit)
    if not et.active:
        return et
    needed = f"; set {', '.join(changed)}" if changed else ""
    say(
        f"--moe-router-type {et.router_type}: target mean fan-out {args.moe_router_topk} of "
        f"{args.num_experts} experts "
        f"(rate {args.moe_router_topk / args.num_experts:.4f}), warm-up {et.warmup_steps} global batches, "
        f"EMA decay {et.ema_decay}{'' if et.guard is None else f', guard {et.guard}'}{needed}"
    )
    return et


def endless_warmup(args: argparse.Namespace, et: ExpertThresholdConfig) -> str | None:
    """A sentence for a run that ends before its thresholds ever route alone; None when they do."""
    before = et.warmup_steps + et.warmup_anneal_steps
    if et.router_type == "expert-choice" or args.train_iters is None or before < args.train_iters:
        return None
    if et.warmup_steps < args.train_iters:
        return (
            f"warm-up and annealing take {before} global batches (--moe-et-warmup-steps, "
            f"--moe-et-warmup-anneal-steps), the run ends after {args.train_iters}: a capacity bound stays "
            "in force to its end"
        )
    return (
        f"the warm-up takes {et.warmup_steps} global batches (--moe-et-warmup-steps), the run ends after "
        f"{args.train_iters}: it will be trained by Expert Choice, thresholds will only evaluate"
    )


FP8_ROWS, MXFP8_ROWS = 16, 32
"""What Megatron pads the rows of an expert to (get_align_size_for_quantization)."""


def _tokens_of_a_rank(args: argparse.Namespace) -> int:
    """Of one micro-batch."""
    split = args.context_parallel_size * (args.tensor_model_parallel_size if args.sequence_parallel else 1)
    return int(args.micro_batch_size * args.seq_length // split)


def check_pool(args: argparse.Namespace, et: ExpertThresholdConfig) -> None:
    """Refuse a routing pool in which an expert's share is less than one token: Expert Choice would select
    nobody.

    Raises:
        ConfigError: with the sizes that make the pool.
    """
    tokens = args.micro_batch_size * args.seq_length
    if et.pool == "global":
        ranks, pool = "all ranks together", tokens * args.data_parallel_size
    else:
        ranks, pool = "a rank", _tokens_of_a_rank(args)
    if expected_load(pool, args.moe_router_topk, args.num_experts) < 1:
        raise ConfigError(
            f"a micro-batch has {pool} tokens on {ranks} (--micro-batch-size {args.micro_batch_size}, "
            "--seq-length "
            f"{args.seq_length}, split by context and sequence parallelism): fewer than --num-experts "
            f"{args.num_experts} / --moe-router-topk {args.moe_router_topk}, so no expert would get one "
            "token. "
            "Raise --micro-batch-size."
        )


MOST_TOKENS = 2**31
"""Of a global batch: counts are int32 (I7)."""


def check_counts(args: argparse.Namespace) -> None:
    """Refuse a global batch whose counts would overflow.

    Raises:
        ConfigError: with the number of tokens.
    """
    tokens = args.global_batch_size * args.seq_length
    if tokens >= MOST_TOKENS:
        raise ConfigError(
            f"a global batch has {tokens} tokens (--global-batch-size times --seq-length), and loads are "
            f"counted in 32 bits, up to {MOST_TOKENS - 1}. Lower --global-batch-size."
        )


def check_padding(args: argparse.Namespace) -> None:
    """Refuse a routing map that cannot be padded: an expert that nearly all tokens of a rank chose has none
    left to be filled up with, and its rows would not be a multiple of what FP8's products need.

    Raises:
        ConfigError: with the sizes.
    """
    if not compatibility.pads_map(args):
        return
    rows = MXFP8_ROWS if getattr(args, "fp8_recipe", None) == "mxfp8" else FP8_ROWS
    tokens = _tokens_of_a_rank(args)
    if tokens % rows:
        raise ConfigError(
            f"--moe-router-padding-for-quantization pads the tokens of each expert to a multiple of {rows}, "
            f"and a micro-batch has {tokens} tokens on a rank, which is none: a nearly full expert cannot be "
            "padded. Remedy: leave it out (the experts pad their own input), or change --micro-batch-size or "
            "--seq-length."
        )


def refuse_yaml(argv: list[str]) -> None:
    """--yaml-cfg makes Megatron forget the command line: refuse it before our flags are silently dropped.

    Raises:
        ConfigError: --yaml-cfg beside flags of this package.
    """
    explicit = explicit_names(argv)
    ours = {dest_of(knob.name) for knob in fields(ExpertThresholdConfig)}
    if "yaml_cfg" in explicit and explicit & ours:
        raise ConfigError(YAML.sentence())


def mend_help(parser: argparse.ArgumentParser) -> None:
    """Megatron's own help texts may hold a bare %, at which argparse fails for every --help."""
    for action in parser._actions:
        try:
            (action.help or "") % (vars(action) | {"prog": parser.prog})
        except (ValueError, TypeError):
            action.help = (action.help or "").replace("%", "%%")


def _add_megatron_arguments(original: Callable[..., Any]) -> Callable[..., Any]:
    def add_megatron_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        exit_on_config_error(refuse_yaml, sys.argv[1:])
        parser = add_arguments(original(parser))
        mend_help(parser)
        return parser

    return add_megatron_arguments


def exit_on_config_error[Result](function: Callable[..., Result], *args: Any) -> Result:
    """A wrong flag is the user's to mend: the sentence, on one rank, without a traceback, and exit status
    2."""
    try:
        return function(*args)
    except ConfigError as error:
        if is_rank_zero():
            print(f"megatron_et: {error}", file=sys.stderr, flush=True)
        sys.exit(2)


def _validate_args(original: Callable[..., Any]) -> Callable[..., Any]:
    def validate_args(args: argparse.Namespace, *rest: Any, **kwargs: Any) -> Any:
        et = exit_on_config_error(prepare, args, explicit_names(sys.argv[1:]))
        result = original(args, *rest, **kwargs)
        if et.active:
            exit_on_config_error(check_pool, args, et)
            exit_on_config_error(check_padding, args)
            exit_on_config_error(check_counts, args)
            if (sentence := endless_warmup(args, et)) is not None:
                say(sentence)
        return result

    return validate_args


def _load_args_from_checkpoint(original: Callable[..., Any]) -> Callable[..., Any]:
    def load_args_from_checkpoint(args: argparse.Namespace, *rest: Any, **kwargs: Any) -> Any:
        result = original(args, *rest, **kwargs)
        if isinstance(result, tuple):
            take_over(args, result[1], explicit_names(sys.argv[1:]))
        return result

    return load_args_from_checkpoint


def take_over(args: argparse.Namespace, saved: argparse.Namespace, explicit: set[str]) -> None:
    """--use-checkpoint-args: take our flags from the checkpoint's arguments unless the command line gives
    them."""
    # A router that refuses them was asked for instead of the checkpoint's: its capacity does not come along.
    useless = {"capacity_factor", "warmup_anneal_steps"} if args.moe_router_type == "expert-choice" else set()
    # Of the machine, not of the model.
    useless |= {"trace_dir", "kernels"}
    for knob in fields(ExpertThresholdConfig):
        name = dest_of(knob.name)
        if knob.name not in useless and name not in explicit and hasattr(saved, name):
            setattr(args, name, getattr(saved, name))


CALLED = (("megatron.training.global_vars", "get_args"),)


def _get_args() -> argparse.Namespace:
    return importlib.import_module(CALLED[0][0]).get_args()


def install() -> None:
    """Bind the seam."""
    seam.require(*CALLED)
    read_arguments_with(_get_args)
    seam.wrap("megatron.training.arguments", "add_megatron_arguments", _add_megatron_arguments)
    seam.wrap("megatron.training.arguments", "validate_args", _validate_args)
    seam.wrap("megatron.training.checkpointing", "load_args_from_checkpoint", _load_args_from_checkpoint)
