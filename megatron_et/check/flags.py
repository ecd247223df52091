"""The training command's flags: parsed by Megatron's own parser, then judged by this package's rules and by
Megatron's own checks, as training does it at start-up.

The seams must not be bound yet: these are Megatron's own functions.
"""

import argparse
import contextlib
import difflib
import importlib
import math
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import torch

from megatron_et.check import layers, packages, sizes
from megatron_et.check.findings import NOTE, OK, PLAIN, REFUSED, Finding, Section, last_line
from megatron_et.config import ConfigError, ExpertThresholdConfig
from megatron_et.host import arguments
from megatron_et.moe import compatibility
from megatron_et.moe.settings import DEEPEP_SLOTS, uses_deepep

# As pretrain_gpt.py gives them.
SCRIPT_DEFAULTS = {"tokenizer_type": "GPT2BPETokenizer"}
ASKED_FOR = ["--moe-router-type", "expert-threshold"]


def judge(words: Sequence[str], *, script: str | None) -> list[Section]:
    """Sections about the flags and the statistics that they lead to; about all flags when none is given."""
    if not words:
        return [_in_general(), Section("statistics", _per_expert())]
    found: list[Finding] = []
    args = _parse(list(words), script, found)
    if args is None:
        return [Section("flags", found)]
    et, config = _check(args, arguments.explicit_names(list(words)), found)
    if et is None or not et.active:
        return [Section("flags", found)]
    return [Section("flags", found), Section("statistics", _statistics(args, et, config))]


def _in_general() -> Section:
    found = [
        Finding(NOTE, "", "no flags given: these are refused, whatever the rest. Give your command's flags")
    ]
    found += [
        Finding(PLAIN, rule.flag, f"{rule.why}. Instead: {rule.instead}.")
        for rule in (*compatibility.REFUSALS, compatibility.POOL_IN_GRAPH, arguments.YAML)
    ]
    for need in compatibility.NEEDED:
        flag = "--" + need.name.replace("_", "-")
        found.append(Finding(PLAIN, flag, f"other than {need.value}: {need.why}. Left out, it is set."))
    text = (
        f"with DeepEP at most {DEEPEP_SLOTS}, divided by expert tensor parallelism: DeepEP has "
        f"{DEEPEP_SLOTS} slots a token. Left out, it is set where there are more experts."
    )
    found.append(Finding(PLAIN, "--moe-et-max-fanout", text))
    return Section("flags", found)


# --- parsing ---


class _Parser(argparse.ArgumentParser):
    """A parser that raises instead of ending the process."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def _parse(words: list[str], script: str | None, found: list[Finding]) -> argparse.Namespace | None:
    from megatron.training.arguments import add_megatron_arguments, parse_args

    if "moe_router_type" not in arguments.explicit_names(words):
        text = (
            "your command has no --moe-router-type: checked as if it had --moe-router-type expert-threshold"
        )
        found.append(Finding(NOTE, "", text))
        words = [*words, *ASKED_FOR]
    parser: argparse.ArgumentParser = _Parser(allow_abbrev=False, add_help=False)
    try:
        arguments.refuse_yaml(words)
        parser = arguments.add_arguments(add_megatron_arguments(parser))
        _, unknown = parser.parse_known_args(words)
    except ConfigError as error:
        found.append(Finding(REFUSED, "", str(error)))
        return None
    except Exception as error:  # a type function of the parser that does not answer with argparse's errors
        found.append(Finding(REFUSED, "", f"Megatron's parser: {last_line(error)}"))
        return None
    found += _name_unknown(unknown, sorted(parser._option_string_actions), script)
    # Megatron's parse_args adds what is not from the command line; it reads both from the process.
    sys.argv = [script or "pretrain_gpt.py", *words]
    os.environ["RANK"], given = "0", os.environ.get("WORLD_SIZE")
    os.environ.setdefault("WORLD_SIZE", "1")
    try:
        args = parse_args(arguments.add_arguments, ignore_unknown_args=True)
    except (Exception, SystemExit) as error:
        found.append(Finding(REFUSED, "", f"Megatron's parse_args: {_where(error)}"))
        return None
    if given is None:
        args.world_size = _fewest_processes(args)
        text = (
            f"WORLD_SIZE is not set: {args.world_size} processes assumed, the fewest that these parallel "
            "sizes need; WORLD_SIZE=... megatron-et check ... for your number"
        )
        found.append(Finding(NOTE, "", text))
    # What check_pool and Megatron's own checks start from.
    shards = args.tensor_model_parallel_size * args.pipeline_model_parallel_size * args.context_parallel_size
    args.data_parallel_size = max(args.world_size // shards, 1)
    return args


# A script's own flags do not begin so; and one as near as this to a flag of Megatron is that flag, misspelt
# (--num-expertz: 0.91). Far above difflib's default, or a script's --data-root would be --data-path.
ROUTING_FLAGS = ("--moe-et-", "--moe-router-")
MISSPELT = 0.9


def _name_unknown(unknown: Sequence[str], known: Sequence[str], script: str | None) -> list[Finding]:
    flags = [word.partition("=")[0] for word in unknown if word.startswith("-")]
    if not flags:
        return [Finding(REFUSED, "", f"{' '.join(unknown)}: belongs to no flag")] if unknown else []
    found, others = [], []
    for flag in flags:
        near = difflib.get_close_matches(flag.lstrip("-"), [name.lstrip("-") for name in known], 1, MISSPELT)
        if near or flag.startswith(ROUTING_FLAGS):
            hint = f": did you mean --{near[0]}?" if near else ""
            found.append(Finding(REFUSED, "", f"{flag}: no flag of this Megatron or this package{hint}"))
        else:
            others.append(flag)
    if others and script is None:
        found.append(Finding(REFUSED, "", f"{' '.join(others)}: no flag of this Megatron"))
    elif others:
        name = Path(str(script)).name
        text = f"{' '.join(others)}: no flag of this Megatron. Right only if {name} adds it itself"
        found.append(Finding(NOTE, "", text))
    return found


def _fewest_processes(args: argparse.Namespace) -> int:
    pipeline = args.pipeline_model_parallel_size
    dense = args.tensor_model_parallel_size * args.context_parallel_size * pipeline
    expert_tensor = args.expert_tensor_parallel_size or args.tensor_model_parallel_size
    return math.lcm(dense, expert_tensor * args.expert_model_parallel_size * pipeline)


# --- judging ---


def _check(
    args: argparse.Namespace, explicit: set[str], found: list[Finding]
) -> tuple[ExpertThresholdConfig | None, Any]:
    """Our settings (None when they are refused) and Megatron's TransformerConfig (None when anything is)."""
    if getattr(args, "use_checkpoint_args", False):
        text = "--use-checkpoint-args: what comes from the checkpoint is not looked at here"
        found.append(Finding(NOTE, "", text))
    found += _expert_parallel_package(args)
    try:
        et, changed = arguments.settle(args, explicit)
    except ConfigError as error:
        found += [Finding(REFUSED, "", sentence) for sentence in str(error).splitlines()]
        found.append(Finding(PLAIN, "", "Megatron's own checks were left out: mend the above first"))
        return _settings(args), None
    if not et.active:
        found.append(Finding(OK, "", "--moe-router-type topk: this package leaves Megatron untouched"))
        _megatrons_own(args, found)
        return et, None
    found.append(Finding(OK, "", f"none refused by this package ({_rule(args, et)})"))
    if changed:
        found.append(Finding(OK, "", f"set at start-up: {', '.join(changed)}"))
    config = _megatrons_own(args, found)
    if config is None:
        return et, None
    for check in (lambda: arguments.check_pool(args, et), lambda: arguments.check_padding(args)):
        try:
            check()
        except ConfigError as error:
            found.append(Finding(REFUSED, "", str(error)))
    if (sentence := arguments.endless_warmup(args, et)) is not None:
        found.append(Finding(NOTE, "", sentence))
    return et, config


def _expert_parallel_package(args: argparse.Namespace) -> list[Finding]:
    """DeepEP or HybridEP, without which Megatron stops when it builds the first MoE layer."""
    if getattr(args, "moe_token_dispatcher_type", None) != "flex":
        return []
    wanted = "DeepEP" if uses_deepep(args) else "HybridEP"
    if "deep_ep" in sys.modules and sys.modules["deep_ep"] is None:  # plugin.examine hid it
        text = f"{wanted} is installed and could not be imported here (environment, above): not checked"
        return [Finding(NOTE, "", f"--moe-token-dispatcher-type flex: {text}")]
    if not packages.installed("deep_ep"):
        lacks = "package deep_ep is not installed here"
    elif wanted == "HybridEP" and not hasattr(importlib.import_module("deep_ep"), "HybridEPBuffer"):
        lacks = "DeepEP that is installed here has no HybridEPBuffer"
    else:
        return []
    text = (
        f"--moe-token-dispatcher-type flex needs {wanted}, and the {lacks}: Megatron stops when it builds "
        "the first MoE layer. Remedy: install it, run this check in the job's container, or use "
        "--moe-token-dispatcher-type alltoall"
    )
    return [Finding(REFUSED, "", text)]


def _settings(args: argparse.Namespace) -> ExpertThresholdConfig | None:
    """Our settings, if they are not what is refused."""
    try:
        return ExpertThresholdConfig.from_args(args)
    except ConfigError:
        return None


def _rule(args: argparse.Namespace, et: ExpertThresholdConfig) -> str:
    return (
        f"{et.router_type}, target mean fan-out {args.moe_router_topk} of {args.num_experts} experts, "
        f"warm-up {et.warmup_steps} global batches"
    )


def _megatrons_own(args: argparse.Namespace, found: list[Finding]) -> Any:
    from megatron.training.arguments import core_transformer_config_from_args, validate_args

    with _some_gpu(found):
        try:
            validate_args(args, dict(SCRIPT_DEFAULTS))
            config = core_transformer_config_from_args(args)
        except (Exception, SystemExit) as error:
            text = f"Megatron's own checks, with this shell's environment variables: {_where(error)}"
            found.append(Finding(REFUSED, "", text))
            return None
    found.append(Finding(OK, "", "none refused by Megatron's own checks"))
    return config


@contextlib.contextmanager
def _some_gpu(found: list[Finding]) -> Iterator[None]:
    """Megatron asks which GPU it is; without one it hears of a Hopper."""
    cuda: Any = torch.cuda
    if cuda.is_available():
        yield
        return
    found.append(Finding(NOTE, "", "no GPU here: Megatron's own checks were run as for a Hopper (H100)"))
    asked = {
        "get_device_capability": lambda *_, **__: (9, 0),
        "get_device_properties": lambda *_, **__: SimpleNamespace(name="H100", major=9, minor=0),
    }
    originals = {name: getattr(cuda, name) for name in asked}
    try:
        for name, answer in asked.items():
            setattr(cuda, name, answer)
        yield
    finally:
        for name, original in originals.items():
            setattr(cuda, name, original)


def _where(error: BaseException) -> str:
    """An error in one line, with the place: assertions of Megatron often have no text."""
    *_, place = traceback.extract_tb(error.__traceback__)
    says = last_line(error) if str(error) else f"{type(error).__name__}: {place.line}"
    return f"{says} ({Path(place.filename).name}:{place.lineno})"


# --- statistics ---


def _per_expert() -> list[Finding]:
    one, two = (sizes.router_bytes(experts, 1) for experts in (1, 2))
    text = (
        f"per expert and MoE layer {two.accumulated - one.accumulated} bytes on every rank, "
        f"{two.reduced - one.reduced} bytes all-reduced per global batch (one call for all layers), "
        f"{two.saved - one.saved} bytes in the checkpoint"
    )
    return [Finding(PLAIN, "", text)]


def _statistics(args: argparse.Namespace, et: ExpertThresholdConfig, config: Any) -> list[Finding]:
    if not args.num_experts or not layers.known(args):
        return [Finding(NOTE, "", "unknown without --num-layers and --num-experts")]
    heads = layers.prediction_heads(args)
    stages = [sum(layers.decoder(args)) + heads] if config is None else layers.per_stage(args, config)
    total, most = sum(stages), max(stages)
    text = f"{total} of {args.num_experts} experts each, one per MoE layer"
    text += f", {heads} of them in MTP heads" if heads else ""
    text += f"; pipeline stages hold {', '.join(map(str, stages))}" if len(stages) > 1 else ""
    found = [Finding(PLAIN, "routers", text)]
    if config is None and args.pipeline_model_parallel_size > 1:
        found.append(Finding(NOTE, "", "split over pipeline stages unknown: all routers on one stage below"))
    one = sizes.router_bytes(args.num_experts, args.moe_router_topk)
    text = (
        f"{sizes.readable(one.saved * total)} in the checkpoint. A rank"
        f"{' of the fullest stage' if len(stages) > 1 else ''}: "
        f"{sizes.readable(one.accumulated * most)} of accumulators; all-reduced per global batch over "
        f"tensor, context and data parallel ranks: {sizes.readable(one.reduced * most)} in one call, with "
        "copies of up to twice that meanwhile"
    )
    found.append(Finding(PLAIN, "bytes", text))
    return found + _pool(args, et, most)


def _pool(args: argparse.Namespace, et: ExpertThresholdConfig, routers: int) -> list[Finding]:
    if et.pool != "global" or not routers:
        return []
    bounds = 2 if et.capacity_factor or et.warmup_anneal_steps else 1
    each = sizes.readable(sizes.pool_bytes(args.num_experts, bounds) * routers)
    text = (
        f"all-reduced in each forward pass of a micro-batch (one that recomputes activations included) while "
        f"a bound is in force: {each} in {sizes.pool_calls() * routers} calls"
    )
    return [Finding(PLAIN, "--moe-et-pool global", text)]
