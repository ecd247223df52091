"""Which Megatron settings are refused (I8), against Megatron's real parser and TransformerConfig.

A refusal is tested by the words that a user would type. Megatron's parser and TransformerConfig say which
names exist and what their defaults are: a rule for a misspelled name would never fire.
"""

import argparse
import copy
import dataclasses
import itertools
import re
from collections.abc import Collection
from functools import cache
from typing import Any

import pytest

from megatron_et.config import ConfigError, ExpertThresholdConfig
from megatron_et.host.arguments import add_arguments
from megatron_et.moe.compatibility import NEEDED, REFUSALS, Refusal, check, violations
from megatron_et.moe.settings import bounded
from tests.megatron_here import absent, needs_newest, needs_training

# Megatron says at every import what is not installed.
pytestmark = [
    pytest.mark.filterwarnings(r"ignore::UserWarning:megatron\."),
    needs_training,
    pytest.mark.smoke,
]

ET = ExpertThresholdConfig(router_type="expert-threshold")
MOE = ["--num-experts", "8"]

HYBRIDEP_PADDED = (
    "--moe-pad-expert-input-to-capacity --moe-expert-capacity-factor 1.0"
    " --moe-token-dispatcher-type flex --moe-flex-dispatcher-backend hybridep"
)

# Rule -> every command line that it must refuse.
REFUSED: dict[str, list[str]] = {
    "--moe-aux-loss-coeff": ["--moe-aux-loss-coeff 0.01", "--moe-aux-loss-coeff 0.0 0.02"],
    "--moe-router-enable-expert-bias": ["--moe-router-enable-expert-bias"],
    "--moe-router-num-groups / --moe-router-group-topk": [
        "--moe-router-num-groups 4",
        "--moe-router-group-topk 2",
        "--moe-router-num-groups 4 --moe-router-group-topk 2",
    ],
    "--moe-router-topk-scaling-factor": ["--moe-router-topk-scaling-factor 2.5"],
    "--moe-router-pre-softmax": ["--moe-router-pre-softmax"],
    "--moe-router-fusion": ["--moe-router-fusion"],
    "--moe-enable-routing-replay": ["--moe-enable-routing-replay"],
    "--moe-apply-probs-on-input": ["--moe-apply-probs-on-input"],
    "--moe-pad-expert-input-to-capacity with such a capacity": [
        "--moe-pad-expert-input-to-capacity --moe-expert-capacity-factor 4.01",
        "--moe-pad-expert-input-to-capacity --moe-expert-capacity-factor 2.7 --moe-router-topk 3",
    ],
    "--moe-router-padding-for-quantization with --moe-pad-expert-input-to-capacity": [
        "--moe-router-padding-for-quantization --moe-pad-expert-input-to-capacity",
        "--moe-router-padding-for-fp8 --moe-pad-expert-input-to-capacity --moe-expert-capacity-factor 1",
    ],
    "--moe-router-padding-for-quantization with DeepEP": [
        "--moe-router-padding-for-quantization --moe-token-dispatcher-type flex",
        "--moe-router-padding-for-fp8 --moe-token-dispatcher-type flex --moe-enable-deepep",
    ],
    "--fp4-format": ["--fp4-format e2m1"],
    "--moe-pad-expert-input-to-capacity with HybridEP, and experts in shards or uneven inputs": [
        f"{HYBRIDEP_PADDED} --expert-tensor-parallel-size 2",
        f"{HYBRIDEP_PADDED} --moe-hybridep-pad-uneven-dispatch-inputs",
    ],
    "--moe-flex-dispatcher-backend ncclep": [
        "--moe-flex-dispatcher-backend ncclep",
        "--moe-token-dispatcher-type flex --moe-flex-dispatcher-backend ncclep",
    ],
    "--transformer-impl inference_optimized": ["--transformer-impl inference_optimized"],
    # Further spellings: test_cuda_graph.py.
    "--cuda-graph-impl full_iteration": ["--cuda-graph-impl full_iteration"],
    "--cuda-graph-impl local": [
        "--enable-cuda-graph",
        "--cuda-graph-impl local",
        "--cuda-graph-impl local --cuda-graph-modules attn",
    ],
    "--cuda-graph-modules / --cuda-graph-scope without a value": [
        "--external-cuda-graph",
        "--cuda-graph-impl transformer_engine",
    ],
    "--cuda-graph-modules / --cuda-graph-scope with moe or moe_preprocess": [
        "--cuda-graph-impl transformer_engine --cuda-graph-modules moe",
        "--cuda-graph-impl transformer_engine --cuda-graph-modules moe_router moe_preprocess",
    ],
    "--overlap-moe-expert-parallel-comm with --moe-token-dispatcher-type flex": [
        "--overlap-moe-expert-parallel-comm --moe-token-dispatcher-type flex",
        "--overlap-moe-expert-parallel-comm --moe-token-dispatcher-type flex"
        " --moe-flex-dispatcher-backend hybridep",
    ],
    "--overlap-moe-expert-parallel-comm with a CUDA graph of moe_router": [
        "--overlap-moe-expert-parallel-comm --cuda-graph-impl transformer_engine"
        " --cuda-graph-modules moe_router",
    ],
    "--overlap-dispatch-backward-with-experts-wgrad": ["--overlap-dispatch-backward-with-experts-wgrad"],
    "--use-transformer-engine-op-fuser": ["--use-transformer-engine-op-fuser"],
    "--batch-invariant-mode": [],  # newer than the pinned version: test_batch_invariance
    "--moe-expert-rank-capacity-factor": ["--moe-expert-rank-capacity-factor 1.5"],
    "--use-megatron-fsdp / --use-torch-fsdp2": ["--use-megatron-fsdp", "--use-torch-fsdp2"],
    "--tensor-parallel-num-weight-shards / --expert-tensor-parallel-num-weight-shards": [
        "--tensor-parallel-num-weight-shards 2",
        "--tensor-model-parallel-size 2 --tensor-parallel-num-weight-shards 4",
        "--expert-tensor-parallel-num-weight-shards 2",
        "--tensor-model-parallel-size 2 --expert-tensor-parallel-size 1"
        " --expert-tensor-parallel-num-weight-shards 2",
    ],
    "--moe-use-upcycling": ["--moe-use-upcycling"],
    "--moe-routing-trace-path": ["--moe-routing-trace-path traces"],
}

# Settings of megatron.training only: a TransformerConfig never carries them.
TRAINING_ONLY = {
    "num_experts",
    "use_megatron_fsdp",
    "use_torch_fsdp2",
    "moe_use_upcycling",
    "moe_routing_trace_path",
    "cuda_graph_scope_deprecated",
    "hybrid_layer_pattern",
    "hybrid_override_pattern",
}


def cases(*, without: Collection[str] = ()) -> list[Any]:
    """(rule, command line) pairs; `without` names attributes whose rules are left out."""
    flags = {"--" + name.replace("_", "-") for name in without}
    return [
        pytest.param(flag, line, id=line.replace(" ", "_"))
        for flag, lines in REFUSED.items()
        for line in lines
        if line.split()[0] not in flags
    ]


@cache
def _parser() -> argparse.ArgumentParser:
    """Megatron's parser with our flags; importing it takes seconds, so once."""
    from megatron.training.arguments import add_megatron_arguments

    parser = argparse.ArgumentParser(allow_abbrev=False)
    return add_arguments(add_megatron_arguments(parser))


def _choices(option: str) -> Any:
    return next(action.choices for action in _parser()._actions if option in action.option_strings)


def parse(line: str = "", *, moe: bool = True) -> argparse.Namespace:
    """Arguments as Megatron's parse_args leaves them, by default of a MoE model."""
    words = line.split()
    options = {option for action in _parser()._actions for option in action.option_strings}
    if unknown := [word for word in words if word.startswith("--") and word not in options]:
        absent(f"flag {unknown[0]}")
    for option, value in itertools.pairwise(words):
        if option.startswith("--") and value not in (_choices(option) or (value,)):
            absent(f"{option} {value}")
    return _parser().parse_args([*(MOE if moe else []), *words])


def given(line: str) -> dict[str, Any]:
    """Attributes that a command line moves away from Megatron's defaults."""
    defaults = vars(parse(moe=False))
    return {k: v for k, v in vars(parse(line, moe=False)).items() if v != defaults[k]}


def transformer_config(**settings: Any) -> Any:
    from megatron.core.transformer import TransformerConfig

    base = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "num_moe_experts": 8}
    known = {field.name for field in dataclasses.fields(TransformerConfig)}
    if unknown := settings.keys() - known:
        absent(f"TransformerConfig.{min(unknown)}")
    return TransformerConfig(**(base | settings))


class Asked:
    """Megatron's defaults that remember which names were asked for."""

    def __init__(self, defaults: dict[str, Any]) -> None:
        self._defaults = defaults
        self._names: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        self._names.add(name)
        try:
            return self._defaults[name]
        except KeyError:
            raise AttributeError(name) from None


def names_asked(rule: Refusal, defaults: dict[str, Any]) -> set[str]:
    """Every name that a rule may read: with nothing set, no `or` stops before its last part."""
    asked = Asked(defaults)
    assert not rule.broken(asked)
    return asked._names


# --- refusals ---


def test_every_rule_has_a_case() -> None:
    assert [rule.flag for rule in REFUSALS] == list(REFUSED)


@pytest.mark.parametrize(("flag", "line"), cases())
def test_what_a_user_types_is_refused(flag: str, line: str) -> None:
    (sentence,) = violations(parse(line))
    assert sentence.startswith(f"{flag} cannot be combined with Expert Threshold routing: ")
    assert " Remedy: " in sentence
    with pytest.raises(ConfigError, match=re.escape(flag)):
        check(parse(line), ET)


@pytest.mark.parametrize(("flag", "line"), cases(without=TRAINING_ONLY))
def test_the_same_setting_is_refused_on_a_transformer_config(flag: str, line: str) -> None:
    settings = given(line)
    # Not through the constructor: Megatron itself refuses some of them without their companions.
    config = transformer_config()
    assert not violations(config)
    for name, value in settings.items():
        assert hasattr(config, name)
        setattr(config, name, value)
    (sentence,) = violations(config)
    assert sentence.startswith(flag)


@pytest.mark.parametrize(
    ("settings", "flag"),
    [
        # __post_init__ moves old spellings to new names and derives sizes: either must be seen.
        ({"cuda_graph_impl": "local"}, "--cuda-graph-impl local"),
        ({"enable_cuda_graph": True}, "--cuda-graph-impl local"),
        ({"external_cuda_graph": True}, "--cuda-graph-modules / --cuda-graph-scope without a value"),
        (
            {"moe_router_enable_expert_bias": True, "moe_router_score_function": "sigmoid"},
            "--moe-router-enable-expert-bias",
        ),
        (
            {"tensor_parallel_num_weight_shards": 2},
            "--tensor-parallel-num-weight-shards / --expert-tensor-parallel-num-weight-shards",
        ),
        (
            {"moe_expert_capacity_factor": 5.0, "moe_pad_expert_input_to_capacity": True},
            "--moe-pad-expert-input-to-capacity with such a capacity",
        ),
        (
            {"moe_router_load_balancing_type": ["aux_loss"], "moe_aux_loss_coeff": [0.01]},
            "--moe-aux-loss-coeff",
        ),
    ],
)
def test_configs_built_by_api_users_are_refused(settings: dict[str, Any], flag: str) -> None:
    (sentence,) = violations(transformer_config(**settings))
    assert sentence.startswith(flag)


def test_batch_invariance() -> None:
    """Refused where Megatron has it for MoE layers: there it is told which kernels to use."""
    settings = argparse.Namespace(num_experts=8, batch_invariant_mode=True)
    assert violations(settings) == []
    settings.batch_invariant_backend = "te_native"
    (sentence,) = violations(settings)
    assert sentence.startswith("--batch-invariant-mode cannot be combined")
    settings.batch_invariant_mode = False
    assert violations(settings) == []


def test_megatrons_defaults_are_accepted() -> None:
    assert violations(parse()) == []
    assert violations(transformer_config()) == []


@pytest.mark.parametrize(
    "line",
    [
        "--moe-token-dispatcher-type alltoall --moe-grouped-gemm --moe-permute-fusion",
        "--moe-token-dispatcher-type flex --moe-flex-dispatcher-backend deepep --moe-permute-fusion",
        "--moe-token-dispatcher-type flex --moe-enable-deepep --expert-model-parallel-size 8",
        "--moe-token-dispatcher-type flex --moe-flex-dispatcher-backend hybridep --num-experts 512",
        HYBRIDEP_PADDED,
        "--moe-z-loss-coeff 1e-3 --moe-input-jitter-eps 0.01",
        "--moe-aux-loss-coeff 0",
        "--moe-aux-loss-coeff 0 0",
        "--moe-expert-capacity-factor -1",  # Megatron's other way to say `no capacity`
        "--moe-expert-capacity-factor 1.25 --moe-token-drop-policy position",
        "--moe-expert-capacity-factor 4 --moe-pad-expert-input-to-capacity",
        "--moe-pad-experts-for-cuda-graph-inference",
        "--moe-router-padding-for-quantization",
        "--moe-router-padding-for-fp8"
        " --moe-token-dispatcher-type flex --moe-flex-dispatcher-backend hybridep",
        "--overlap-moe-expert-parallel-comm --delay-wgrad-compute --expert-model-parallel-size 2",
        "--transformer-impl local --cuda-graph-impl none",
        "--cuda-graph-impl transformer_engine --cuda-graph-modules attn moe_router",
        "--external-cuda-graph --cuda-graph-scope moe_router",
        "--tensor-model-parallel-size 2 --tensor-parallel-num-weight-shards 2",
        "--moe-shared-expert-intermediate-size 64 --moe-shared-expert-overlap",
        "--use-distributed-optimizer --sequence-parallel",
        "--moe-router-score-function sigmoid --moe-router-dtype fp32 --moe-router-load-balancing-type none",
    ],
)
def test_what_runs_is_accepted(line: str) -> None:
    args = parse(line)
    explicit = {word.removeprefix("--").replace("-", "_") for word in line.split() if word.startswith("--")}
    check(args, ET, explicit)


def test_all_problems_are_listed_at_once() -> None:
    args = parse("--moe-router-pre-softmax --moe-router-fusion --moe-router-topk 9")
    et = ExpertThresholdConfig(router_type="expert-threshold", max_fanout=5)
    with pytest.raises(ConfigError) as error:
        check(args, et)
    lines = str(error.value).splitlines()
    assert len(lines) == 4
    wanted = ("--moe-router-pre-softmax", "--moe-router-fusion", "--moe-router-topk is 9", "--moe-et-max-fan")
    assert all(line.startswith(start) for line, start in zip(lines, wanted, strict=True))


@pytest.mark.parametrize(
    ("line", "flags"),
    [
        pytest.param(
            "--moe-router-score-function softmax --moe-router-dtype fp64",
            ("--moe-router-score-function", "--moe-router-dtype"),
            id="two-needed",
        ),
        pytest.param(
            "--moe-router-load-balancing-type sinkhorn --moe-router-fusion",
            ("--moe-router-load-balancing-type", "--moe-router-fusion"),
            id="needed-and-refused",
        ),
    ],
)
def test_problems_with_needed_settings_are_listed_with_the_others(line: str, flags: tuple[str, ...]) -> None:
    args = parse(line)
    before = copy.deepcopy(vars(args))
    with pytest.raises(ConfigError) as error:
        check(args, ET, {"moe_router_score_function", "moe_router_dtype"})
    assert all(flag in str(error.value) for flag in flags)
    assert vars(args) == before  # nothing is set beside a refusal


# --- names ---


@needs_newest
@pytest.mark.parametrize("rule", REFUSALS, ids=lambda rule: rule.flag.replace(" ", "_"))
def test_rules_ask_for_names_that_exist(rule: Refusal) -> None:
    args, config = vars(parse()), vars(transformer_config())
    names = names_asked(rule, args) | names_asked(rule, config)
    assert names
    assert names <= args.keys() | config.keys()
    assert names <= config.keys() | TRAINING_ONLY


@needs_newest
def test_rules_and_remedies_name_flags_that_exist() -> None:
    options = {option for action in _parser()._actions for option in action.option_strings}
    for rule in REFUSALS:
        flags = set(re.findall(r"--[a-z0-9-]+", f"{rule.flag} {rule.why} {rule.instead}"))
        assert flags
        assert flags <= options, flags - options


def test_the_sizes_that_rules_read_exist() -> None:
    assert {"num_experts", "moe_router_topk"} <= vars(parse()).keys()
    assert {"num_moe_experts", "moe_router_topk"} <= vars(transformer_config()).keys()


@pytest.mark.parametrize("need", NEEDED, ids=lambda need: need.name)
def test_needed_settings_are_megatrons(need: Any) -> None:
    """Name, default and wanted value: a stale default would turn `left alone` into a refusal."""
    (action,) = [a for a in _parser()._actions if "--" + need.name.replace("_", "-") in a.option_strings]
    assert action.dest == need.name
    assert action.default == need.default
    assert need.value in (action.choices or ())
    assert getattr(transformer_config(), need.name) == need.default


# --- needed settings ---

WANTED = {
    "moe_router_score_function": "sigmoid",
    "moe_router_dtype": "fp32",
    "moe_router_load_balancing_type": "none",
}


@pytest.mark.parametrize("settings", [parse, transformer_config], ids=["args", "config"])
def test_settings_left_alone_are_set_and_told(settings: Any) -> None:
    args = settings()
    before = copy.copy(vars(args))
    changed = check(args, ET)
    assert changed == [f"{name}={value}" for name, value in WANTED.items()]
    assert vars(args) == before | WANTED


def test_settings_already_right_are_left() -> None:
    args = parse(
        "--moe-router-score-function sigmoid --moe-router-dtype fp32 --moe-router-load-balancing-type none"
    )
    assert args.moe_router_load_balancing_type == ["none"]  # nargs='+'
    before = copy.deepcopy(vars(args))
    assert check(args, ET, set(WANTED)) == []
    assert vars(args) == before


def test_twice_is_once() -> None:
    """Every router of a model checks the one config that they share."""
    config = transformer_config()
    assert check(config, ET)
    assert check(config, ET) == []


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("--moe-router-score-function sqrtsoftplus", "'sqrtsoftplus'"),
        ("--moe-router-dtype fp64", "'fp64'"),
        ("--moe-router-load-balancing-type sinkhorn", "'sinkhorn'"),
        ("--moe-router-load-balancing-type seq_aux_loss", "'seq_aux_loss'"),
        ("--moe-router-load-balancing-type none aux_loss", "['none', 'aux_loss']"),
        ("--moe-router-load-balancing-type aux_loss global_aux_loss", "['aux_loss', 'global_aux_loss']"),
        ("--moe-router-load-balancing-type quantile_balancing", "'quantile_balancing'"),
    ],
)
def test_other_values_are_refused_however_they_were_given(line: str, value: str) -> None:
    flag, name = line.split()[0], line.split()[0].removeprefix("--").replace("-", "_")
    for explicit in ((), (name,)):
        with pytest.raises(ConfigError) as error:
            check(parse(line), ET, explicit)
        assert str(error.value).startswith(f"{flag} is {value}, Expert Threshold routing needs ")
        assert f"Remedy: leave {flag} out." in str(error.value)


@pytest.mark.parametrize(
    "line", ["--moe-router-score-function softmax", "--moe-router-load-balancing-type aux_loss"]
)
def test_megatrons_default_typed_by_the_user_is_refused(line: str) -> None:
    name = line.split()[0].removeprefix("--").replace("-", "_")
    with pytest.raises(ConfigError, match=line.split()[0]):
        check(parse(line), ET, {name})
    # The same value from a configuration that nobody typed stands for `left alone`.
    args = parse(line)
    check(args, ET)
    assert getattr(args, name) == WANTED[name]


def test_a_balancing_type_in_a_list_stands_for_itself() -> None:
    args = argparse.Namespace(
        num_experts=8, moe_router_load_balancing_type=["aux_loss"], moe_router_dtype="fp32"
    )
    assert check(args, ET) == ["moe_router_score_function=sigmoid", "moe_router_load_balancing_type=none"]
    assert args.moe_router_load_balancing_type == "none"


# --- sizes ---


def test_a_dense_model_is_refused_in_one_sentence() -> None:
    et = ExpertThresholdConfig(router_type="expert-threshold", max_fanout=4)
    for dense in (parse(moe=False), transformer_config(num_moe_experts=None)):
        with pytest.raises(ConfigError) as error:
            check(dense, et)
        assert str(error.value) == "--moe-router-type other than topk needs a MoE model: give --num-experts."


@pytest.mark.parametrize("topk", [-1, 0, 9])
def test_topk_out_of_range(topk: int) -> None:
    config = transformer_config()
    config.moe_router_topk = topk
    for settings in (parse(f"--moe-router-topk {topk}"), config):
        (sentence,) = violations(settings)
        assert f"--moe-router-topk is {topk}:" in sentence
        assert "--num-experts 8" in sentence


@pytest.mark.parametrize("topk", [1, 8])
def test_topk_at_the_ends_of_its_range(topk: int) -> None:
    assert violations(parse(f"--moe-router-topk {topk}")) == []


@pytest.mark.parametrize(
    ("max_fanout", "wrong"),
    [(2, "below the target mean fan-out --moe-router-topk 3"), (9, "above --num-experts 8")],
)
def test_max_fanout_out_of_range(max_fanout: int, wrong: str) -> None:
    et = ExpertThresholdConfig(router_type="expert-threshold", max_fanout=max_fanout)
    for settings in (parse("--moe-router-topk 3"), transformer_config(moe_router_topk=3)):
        with pytest.raises(ConfigError, match=f"--moe-et-max-fanout is {max_fanout}, {wrong}"):
            check(settings, et)


@pytest.mark.parametrize("max_fanout", [None, 3, 8])
def test_max_fanout_at_the_ends_of_its_range(max_fanout: int | None) -> None:
    et = ExpertThresholdConfig(router_type="expert-threshold", max_fanout=max_fanout)
    assert len(check(parse("--moe-router-topk 3"), et)) == len(NEEDED)


# --- users without megatron.training ---


def test_building_a_router_checks_its_config() -> None:
    """The refusal comes before Megatron's own constructor, which asks for a GPU."""
    from megatron_et.moe.router import ExpertThresholdRouter
    from megatron_et.moe.settings import CONFIG_ATTRIBUTE

    config = transformer_config(moe_router_pre_softmax=True)
    setattr(config, CONFIG_ATTRIBUTE, ET)
    with pytest.raises(ConfigError, match="--moe-router-pre-softmax cannot be combined"):
        ExpertThresholdRouter(config)
    with pytest.raises(ConfigError, match="--moe-router-pre-softmax cannot be combined"):
        ExpertThresholdRouter(transformer_config(moe_router_pre_softmax=True), et_config=ET)


def test_a_router_is_not_built_for_topk() -> None:
    from megatron_et.moe.router import ExpertThresholdRouter

    # No attribute on the config and no parsed arguments: plain top-k.
    with pytest.raises(ConfigError, match=r"built with --moe-router-type topk.*TopKRouter"):
        ExpertThresholdRouter(transformer_config())


# --- DeepEP's bound on the fan-out ---

DEEPEP = "--moe-token-dispatcher-type flex --num-experts 256 --moe-router-topk 8"
SLOTS = "DeepEP has 32 slots a token"


def sizes(line: str) -> Any:
    """The TransformerConfig of a command line that gives sizes and the dispatcher."""
    settings = given(line)
    return transformer_config(
        num_attention_heads=4, add_bias_linear=False, num_moe_experts=settings.pop("num_experts"), **settings
    )


@pytest.mark.parametrize("settings", [parse, sizes], ids=["args", "config"])
@pytest.mark.parametrize(
    ("line", "most", "why"),
    [
        ("", 32, SLOTS),
        ("--num-experts 33", 32, SLOTS),
        ("--moe-enable-deepep --expert-model-parallel-size 64", 32, SLOTS),
        (
            "--tensor-model-parallel-size 2",
            16,
            f"{SLOTS}, and expert tensor parallelism over 2 ranks takes 2 an expert",
        ),
        ("--num-experts 9 --tensor-model-parallel-size 4", 8, "over 4 ranks takes 4 an expert"),
        ("--tensor-model-parallel-size 2 --expert-tensor-parallel-size 1", 32, SLOTS),
        (
            "--expert-model-parallel-size 128",
            8,
            "at most 8 nodes of 8 ranks, and 128 ranks share the experts",
        ),
        ("--tensor-model-parallel-size 2 --expert-model-parallel-size 64", 8, "128 ranks share the experts"),
    ],
)
def test_deepep_bounds_the_fanout(settings: Any, line: str, most: int, why: str) -> None:
    told = check(settings(f"{DEEPEP} {line}"), ET)[-1]
    assert told.startswith(f"moe_et_max_fanout={most} (")
    assert why in told
    assert bounded(ET, settings(f"{DEEPEP} {line}")).max_fanout == most
    largest = dataclasses.replace(ET, max_fanout=most)
    assert not any(text.startswith("moe_et") for text in check(settings(f"{DEEPEP} {line}"), largest))
    with pytest.raises(ConfigError, match=f"--moe-et-max-fanout is {most + 1}, above {most}: ") as error:
        check(settings(f"{DEEPEP} {line}"), dataclasses.replace(ET, max_fanout=most + 1))
    assert why in str(error.value)


@pytest.mark.parametrize(
    "line",
    [
        "--num-experts 32",
        "--num-experts 16 --tensor-model-parallel-size 2",
        "--moe-token-dispatcher-type alltoall",
        "--moe-flex-dispatcher-backend hybridep --expert-model-parallel-size 128",
    ],
)
def test_no_bound_where_no_token_can_pass_it(line: str) -> None:
    for settings in (parse(f"{DEEPEP} {line}"), sizes(f"{DEEPEP} {line}")):
        assert bounded(ET, settings) == ET
        assert not any(text.startswith("moe_et") for text in check(settings, ET))


def test_a_target_above_the_bound_is_refused() -> None:
    for settings in (parse, sizes):
        with pytest.raises(ConfigError, match=r"--moe-router-topk is 40: .* more than 32 experts"):
            check(settings(f"{DEEPEP} --moe-router-topk 40"), ET)


@pytest.mark.parametrize("topk", [16, 17])
def test_a_bound_near_the_target_is_said(topk: int) -> None:
    told = check(parse(f"{DEEPEP} --moe-router-topk {topk}"), ET)[-1]
    assert ("less than twice --moe-router-topk 17: watch moe/fanout_max" in told) == (topk == 17)


def test_topk_runs_are_not_bounded() -> None:
    plain = ExpertThresholdConfig()
    assert bounded(plain, parse(DEEPEP)) is plain
