"""Which Megatron settings are refused (I8), against Megatron's real parser and TransformerConfig.

A refusal is tested by the words that a user would type. Megatron's parser and TransformerConfig say which
names exist and what their defaults are: a rule for a misspelled name would never fire.
"""

import argparse
import copy
import re
from collections.abc import Collection
from functools import cache
from typing import Any

import pytest

from megatron_et.compatibility import NEEDED, REFUSALS, Refusal, check, violations
from megatron_et.config import ConfigError, ExpertThresholdConfig
from megatron_et.host.arguments import add_arguments

# Megatron says at every import what is not installed.
pytestmark = pytest.mark.filterwarnings(r"ignore::UserWarning:megatron\.")

ET = ExpertThresholdConfig(router_type="expert-threshold")
MOE = ["--num-experts", "8"]

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
    "--moe-expert-capacity-factor": ["--moe-expert-capacity-factor 1.0", "--moe-expert-capacity-factor 0"],
    "--moe-pad-expert-input-to-capacity": ["--moe-pad-expert-input-to-capacity"],
    "--moe-pad-experts-for-cuda-graph-inference": ["--moe-pad-experts-for-cuda-graph-inference"],
    "--moe-router-padding-for-quantization": [
        "--moe-router-padding-for-quantization",
        "--moe-router-padding-for-fp8",
    ],
    "--moe-token-dispatcher-type flex": ["--moe-token-dispatcher-type flex", "--moe-enable-deepep"],
    "--transformer-impl inference_optimized": ["--transformer-impl inference_optimized"],
    "--cuda-graph-impl": [
        "--enable-cuda-graph",
        "--external-cuda-graph",
        "--cuda-graph-impl local",
        "--cuda-graph-impl transformer_engine",
        "--cuda-graph-impl full_iteration",
    ],
    "--overlap-moe-expert-parallel-comm": ["--overlap-moe-expert-parallel-comm"],
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


def parse(line: str = "", *, moe: bool = True) -> argparse.Namespace:
    """Arguments as Megatron's parse_args leaves them, by default of a MoE model."""
    return _parser().parse_args([*(MOE if moe else []), *line.split()])


def given(line: str) -> dict[str, Any]:
    """Attributes that a command line moves away from Megatron's defaults."""
    defaults = vars(parse(moe=False))
    return {k: v for k, v in vars(parse(line, moe=False)).items() if v != defaults[k]}


def transformer_config(**settings: Any) -> Any:
    from megatron.core.transformer import TransformerConfig

    base = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "num_moe_experts": 8}
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
        ({"cuda_graph_impl": "local"}, "--cuda-graph-impl"),
        ({"enable_cuda_graph": True}, "--cuda-graph-impl"),
        ({"external_cuda_graph": True}, "--cuda-graph-impl"),
        (
            {"moe_router_enable_expert_bias": True, "moe_router_score_function": "sigmoid"},
            "--moe-router-enable-expert-bias",
        ),
        (
            {"tensor_parallel_num_weight_shards": 2},
            "--tensor-parallel-num-weight-shards / --expert-tensor-parallel-num-weight-shards",
        ),
        ({"moe_expert_capacity_factor": 1.0}, "--moe-expert-capacity-factor"),
        (
            {"moe_router_load_balancing_type": ["aux_loss"], "moe_aux_loss_coeff": [0.01]},
            "--moe-aux-loss-coeff",
        ),
    ],
)
def test_configs_built_by_api_users_are_refused(settings: dict[str, Any], flag: str) -> None:
    (sentence,) = violations(transformer_config(**settings))
    assert sentence.startswith(flag)


def test_megatrons_defaults_are_accepted() -> None:
    assert violations(parse()) == []
    assert violations(transformer_config()) == []


@pytest.mark.parametrize(
    "line",
    [
        "--moe-token-dispatcher-type alltoall --moe-grouped-gemm --moe-permute-fusion",
        "--moe-z-loss-coeff 1e-3 --moe-input-jitter-eps 0.01",
        "--moe-aux-loss-coeff 0",
        "--moe-aux-loss-coeff 0 0",
        "--moe-expert-capacity-factor -1",  # Megatron's other way to say `no capacity`
        "--transformer-impl local --cuda-graph-impl none",
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


@pytest.mark.parametrize("rule", REFUSALS, ids=lambda rule: rule.flag.replace(" ", "_"))
def test_rules_ask_for_names_that_exist(rule: Refusal) -> None:
    args, config = vars(parse()), vars(transformer_config())
    names = names_asked(rule, args) | names_asked(rule, config)
    assert names
    assert names <= args.keys() | config.keys()
    assert names <= config.keys() | TRAINING_ONLY


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
    from megatron_et.router import CONFIG_ATTRIBUTE, ExpertThresholdRouter

    config = transformer_config(moe_router_pre_softmax=True)
    setattr(config, CONFIG_ATTRIBUTE, ET)
    with pytest.raises(ConfigError, match="--moe-router-pre-softmax cannot be combined"):
        ExpertThresholdRouter(config)
    with pytest.raises(ConfigError, match="--moe-router-pre-softmax cannot be combined"):
        ExpertThresholdRouter(transformer_config(moe_router_pre_softmax=True), et_config=ET)


def test_a_router_is_not_built_for_topk() -> None:
    from megatron_et.router import ExpertThresholdRouter

    # No attribute on the config and no parsed arguments: plain top-k.
    with pytest.raises(ConfigError, match=r"built with --moe-router-type topk.*TopKRouter"):
        ExpertThresholdRouter(transformer_config())
