"""The scale model: limits that are known exactly, numbers worked out by hand, and simulations against drawn
tokens.

Dimension letters: N steps, L layers, S sequences, T tokens, E experts.
"""

import csv
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import scale_model
from benchmarks.scale import boundary, check, cost, memory, network, plots, published, report, tables
from benchmarks.scale.assumptions import TABLE, Hardware, read
from benchmarks.scale.fit import fit
from benchmarks.scale.loads import Group, Text, draw
from benchmarks.scale.measure import Measured, gloo_rows, numbers
from benchmarks.scale.measure import read as read_measured
from benchmarks.scale.measure import write as write_measured
from benchmarks.scale.network import ALGORITHMS, Network
from benchmarks.scale.quadrature import correlation_of, joint_share, logit_of
from benchmarks.scale.runs import Loads
from benchmarks.scale.shapes import GPUS, SHAPES, place
from megatron_et.rule.statistics import RouterStatistics

RESULTS = Path(__file__).resolve().parents[3] / "benchmarks" / "results"
SIMPLE = Network(nvlink=100.0, nic=10.0, nvlink_hop=1.0, nic_hop=3.0, launch=2.0)
MIXTRAL = SHAPES[0]

# Megatron says at every import what is not installed.
pytestmark = pytest.mark.filterwarnings(r"ignore::UserWarning:megatron\.")


@pytest.fixture
def hardware() -> Hardware:
    return read()[1]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_shapes_have_the_published_numbers_of_parameters(shape) -> None:
    total, active = shape.published
    assert shape.parameters() / 1e9 == pytest.approx(total, rel=0.002)
    assert shape.active / 1e9 == pytest.approx(active, rel=0.02)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
@pytest.mark.parametrize("gpus", GPUS)
def test_layouts_fill_the_gpus(shape, gpus: int) -> None:
    placement = place(shape, gpus)
    layout = placement.layout
    assert gpus % (layout.pp * layout.ep) == 0
    assert shape.experts % layout.ep == 0
    # Every pipeline has as many micro-batches as stages, and no sequence is left over.
    assert placement.micro_batches >= layout.pp
    pipelines = gpus // (layout.tp * layout.pp)
    assert placement.micro_batches * pipelines == layout.sequences


def test_a_flop_count_by_hand() -> None:
    # Mixtral: attention 2 x 4096^2 + 2 x 4096 x 1024, two experts of 3 x 4096 x 14336, router, two norms.
    layer = 41_943_040 + 2 * 176_160_768 + 32_768 + 8_192
    weights = 32 * layer + 32_000 * 4096 + 4096
    scores = 32 * 3 * 4096 * 32 * 256
    assert MIXTRAL.flops() == 6 * weights + scores


def test_one_rank_has_no_traffic(hardware: Hardware) -> None:
    assert all(algorithm(1e9, 1, SIMPLE) == 0.0 for algorithm in ALGORITHMS.values())
    alone = place(replace(MIXTRAL, layout=replace(MIXTRAL.layout, ep=1)), 64)
    assert cost.exposure(alone, hardware).all_to_all == 0.0


def test_all_reduce_times_by_hand() -> None:
    # 16 ranks in 2 nodes: the NICs of a node together (80) are slower than NVLink (100).
    assert network.ring(800.0, 16, SIMPLE) == 2 + 2 * 2 * 7 * 1 + 2 * 1 * 3 + 2 * 15 / 16 * 800 / 80
    assert network.tree(800.0, 16, SIMPLE) == 2 + 2 * (7 * 1 + 1 * 3) + 2 * 800 / 80
    inside = 2 * 7 * (1 + 100 / 100)
    assert network.hierarchical(800.0, 16, SIMPLE) == 2 + inside + 2 * (3 + 100 / 10)
    # In one node only NVLink.
    assert network.ring(800.0, 8, SIMPLE) == 2 + 2 * 7 * 1 + 2 * 7 / 8 * 800 / 100
    assert network.best(800.0, 16, SIMPLE)[0] == "tree"


@pytest.mark.parametrize("name", ALGORITHMS)
def test_all_reduces_take_longer_with_more_ranks_and_bytes(name: str) -> None:
    ranks = [1, 2, 4, 8, 16, 64, 256, 2048]
    times = [ALGORITHMS[name](1e6, number, SIMPLE) for number in ranks]
    assert times == sorted(times)
    assert ALGORITHMS[name](2e6, 64, SIMPLE) > ALGORITHMS[name](1e6, 64, SIMPLE)


def test_a_line_is_found_again() -> None:
    sizes = [2.0**power for power in range(10, 24)]
    line = network.fit(sizes, [3e-4 + size / 7e8 for size in sizes])
    assert line.latency == pytest.approx(3e-4)
    assert line.speed == pytest.approx(7e8)


def test_statistics_of_a_router_by_hand(hardware: Hardware) -> None:
    # 8 experts: 4 x 8 + 3 counts and 8 x BINS bins, 4 bytes each; 8 routers in a stage.
    placement = place(MIXTRAL, 64)
    found = cost.statistics(placement, hardware)
    assert found.reduced_bytes == 4 * 8 * (35 + 8 * boundary.BINS)
    assert boundary.sizes(8, 2).reduced == 4 * RouterStatistics(8, 2).size()
    # Half the bins leave the other counts as they are.
    halved = cost.statistics(placement, hardware, bins=boundary.BINS // 2)
    assert halved.reduced_bytes == 4 * 8 * (35 + 4 * boundary.BINS)
    assert halved.share() < found.share()
    # 256 sequences of 4,096 tokens on 64 GPUs: 32 layers of 8 experts.
    pairs = 256 * 4096 // 64 * 32 * 8
    assert found.counting_seconds["cuda"] == pytest.approx(2.5e-12 * pairs)
    assert found.share("torch") > found.share("triton") > found.share("cuda") > found.share()


def test_operations_and_bytes_are_those_of_the_code() -> None:
    costs = boundary.measure()
    # At least: read the counts, copy them for the reduction, zero them, sum them up.
    assert costs.boundary_bytes > 4 * 6
    # The accumulators, their copy and the running sums.
    assert costs.boundary_memory >= 3 * 4
    assert costs.pair_bytes > costs.routing_pair_bytes > 4 + 4 + 1
    assert 20 < costs.boundary_operations < 150


def binomial_tail(tokens: int, rate: float, at_least: int) -> float:
    logs = [
        math.lgamma(tokens + 1) - math.lgamma(k + 1) - math.lgamma(tokens - k + 1)
        + k * math.log(rate) + (tokens - k) * math.log1p(-rate)
        for k in range(at_least, tokens + 1)
    ]  # fmt: skip
    return math.fsum(map(math.exp, logs))


def test_independent_tokens_are_binomial() -> None:
    group = Group(16, 1, ranks=4, sequence=256)
    receive = draw(np.random.default_rng(0), "ET", group, Text(), 4000).receive_DR * group.target
    # 4 experts of a rank, 4 ranks' tokens: a binomial of 16 times as many.
    for rows in (256, 270, 290):
        exact = binomial_tail(256 * 16, 1 / 16, rows)
        share = (receive >= rows).mean()
        assert abs(share - exact) < 4 * math.sqrt(exact / receive.size) + 1e-4
    cumulant = memory.cumulants(group, Text())
    for probability in (1e-2, 1e-6, 1e-12):
        room = memory.head_room(cumulant, group.target, 1.0, probability)
        exact = binomial_tail(256 * 16, 1 / 16, math.ceil(room * group.target))
        assert probability / 100 < exact <= probability


def test_head_room_grows_with_the_run_and_shrinks_with_layers() -> None:
    group, text = Group(128, 8, 32, 4096, sharers=2), Text(own=0.1, common=0.02)
    cumulant = memory.cumulants(group, text)

    def room(layers: int, occasions: float, text: Text = text) -> float:
        several = memory.cumulants(group, text, layers)
        return memory.head_room(several, layers * group.target, occasions, 1e-3)

    assert 1.0 < room(94, 1e6) < room(94, 1e12) < room(1, 1e12)
    assert room(1, 1e12) < 1 / group.rate
    # What is common stays common over the layers; what experts have of their own averages out.
    only_own, only_common = Text(own=0.1), Text(common=0.02)
    assert room(94, 1e12, only_own) - 1.0 < 0.2 * (room(1, 1e12, only_own) - 1.0)
    assert room(94, 1e12, only_common) - 1.0 > 0.8 * (room(1, 1e12, only_common) - 1.0)
    # What sequences have in common needs more, and no simulated load of 20,000 lies above the bound.
    assert room(1, 1e12, Text()) < room(1, 1e12)
    drawn = draw(np.random.default_rng(1), "ET", group, text, 625)
    assert drawn.receive_DR.size == 20_000
    assert drawn.receive_DR.max() < room(1, 20_000)
    # K'(0) is the mean.
    assert cumulant[0] / memory.TILTS[0] == pytest.approx(group.target, rel=1e-3)


@pytest.mark.parametrize("text", [Text(), Text(own=0.3, common=0.1)])
def test_no_capacity_is_forced_balance(text: Text) -> None:
    group = Group(16, 2, ranks=4, sequence=256)
    drawn = draw(np.random.default_rng(0), "ET", group, text, 50, capacity=0.0)
    assert (drawn.grouped_gemm_D == 1.0).all()
    assert (drawn.all_to_all_D == 1.0).all()


def test_capacity_is_a_hard_bound() -> None:
    group = Group(16, 2, ranks=4, sequence=256)
    free = draw(np.random.default_rng(0), "ET", group, Text(own=0.3), 200)
    bound = draw(np.random.default_rng(0), "ET", group, Text(own=0.3), 200, capacity=0.25)
    assert free.receive_DR.max() > 1.25 >= bound.receive_DR.max()
    assert bound.receive_DR.min() >= 0.75 > free.receive_DR.min()
    found = tables.moved(free, 0.25)
    assert 0.0 < found["dropped"] < found["acts"] <= 1.0


@pytest.mark.parametrize("rule", ["ET", "top-k"])
def test_the_busiest_rank_of_more_ranks_is_busier(rule) -> None:
    busiest = [
        draw(np.random.default_rng(0), rule, Group(32, 4, ranks, 512), Text(), 400).grouped_gemm_D.mean()
        for ranks in (1, 2, 4, 8, 16)
    ]
    assert busiest == sorted(busiest)
    assert busiest[0] == pytest.approx(1.0, abs=5e-3)


def test_topk_sends_what_it_must() -> None:
    drawn = draw(np.random.default_rng(0), "top-k", Group(16, 2, 4, 256), Text(own=0.2, wander=0.5), 50)
    assert np.allclose(drawn.send_DR, 1.0)
    # The common part moves all experts alike, which is nothing to top-k but fan-outs to ET.
    common = Text(common=0.1)
    assert np.allclose(draw(np.random.default_rng(0), "top-k", Group(16, 2, 4, 256), common, 50).send_DR, 1.0)
    assert draw(np.random.default_rng(0), "ET", Group(16, 2, 4, 256), common, 50).send_DR.std() > 0.1


def tokens_NLSTE(text: Text, steps: int, sequences: int, tokens: int, experts: int) -> np.ndarray:
    """Logits drawn token by token, as the model says."""
    rng = np.random.default_rng(5)
    own = math.sqrt(text.own) * rng.standard_normal((steps, 1, sequences, 1, experts))
    common = math.sqrt(text.common) * rng.standard_normal((steps, 1, sequences, 1, 1))
    rest = math.sqrt(1 - text.own - text.common)
    return own + common + rest * rng.standard_normal((steps, 1, sequences, tokens, experts))


@pytest.mark.parametrize("rule", ["ET", "top-k"])
def test_drawn_tokens_are_predicted_and_their_text_is_found(rule) -> None:
    group = Group(16, 2, ranks=4, sequence=256, batch=2)
    text = Text(own=0.10, common=0.03) if rule == "ET" else Text(own=0.10)
    logits = tokens_NLSTE(text, 150, 8, 256, 16)
    if rule == "ET":
        taken = logits >= logit_of(group.rate)
    else:
        taken = logits >= np.partition(logits, -group.topk, axis=4)[..., -group.topk, None]
    loads = Loads(taken.sum(axis=3), np.square(taken.sum(axis=4)).sum(axis=3), None)
    found = fit(loads, rule, group)
    assert found.own == pytest.approx(text.own, rel=0.2)
    assert found.common == pytest.approx(text.common, abs=0.012)
    assert abs(found.dispersion) < 0.05
    assert found.wander < 0.1

    real = check.summary(replace(check.observed(loads, 4), group=group))
    model = check.summary(draw(np.random.default_rng(6), rule, group, found, 2000))
    for name, value in real.items():
        if name.startswith("busiest"):
            # Mean field: top-k among few experts is a little more uneven than it says.
            assert model[name] - 1.0 == pytest.approx(value - 1.0, rel=0.2), name
        else:
            assert model[name] == pytest.approx(value, rel=0.25, abs=0.01), name


def test_unequal_experts_and_odd_fan_outs_are_found() -> None:
    group = Group(16, 2, ranks=4, sequence=256)
    rng = np.random.default_rng(7)
    rates = group.rate * rng.choice([0.8, 1.2], size=16)
    # Half of the tokens go nowhere, the others to twice as many.
    awake = rng.random((200, 1, 4, 256, 1)) < 0.5
    taken = awake & (rng.random((200, 1, 4, 256, 16)) < 2 * rates)
    loads = Loads(taken.sum(axis=3), np.square(taken.sum(axis=4)).sum(axis=3), None)
    found = fit(loads, "ET", group)
    assert found.wander == pytest.approx(0.2, rel=0.15)
    assert found.sway < 0.05
    assert found.level == pytest.approx(rates.sum() / 2, rel=0.02)
    assert found.own < 0.005
    # Var of the fan-out: 2 x mean within the awake ones, and the two halves' distance of a mean each.
    mean = rates.sum()
    independent = (rates * (1 - rates)).sum()
    expected = 0.5 * (2 * rates * (1 - 2 * rates)).sum() + mean**2
    assert found.dispersion == pytest.approx(expected / independent - 1, rel=0.1)


def test_thresholds_that_move_together_are_found() -> None:
    group = Group(16, 2, ranks=4, sequence=256)
    rng = np.random.default_rng(8)
    steps = 0.8 * rng.choice([0.7, 1.3], size=(400, 1, 1, 1, 1))
    taken = rng.random((400, 1, 4, 256, 16)) < group.rate * steps
    loads = Loads(taken.sum(axis=3), np.square(taken.sum(axis=4)).sum(axis=3), None)
    found = fit(loads, "ET", group)
    assert found.sway == pytest.approx(0.3, rel=0.1)
    assert found.level == pytest.approx(0.8, rel=0.05)
    assert found.wander < 0.05
    # Nothing is the ranks' own, so that all rows together vary as the steps do.
    drawn = draw(np.random.default_rng(9), "ET", group, found, 4000)
    assert drawn.receive_DR.mean(axis=1).std() == pytest.approx(0.8 * 0.3, rel=0.1)
    assert check.layers_together(loads, 4)["steps"] == pytest.approx(1.0)


def test_joint_share_at_its_ends() -> None:
    assert joint_share(0.1, 0.0) == pytest.approx(0.01)
    assert joint_share(0.5, 0.5) == pytest.approx(0.25 + math.asin(0.5) / (2 * math.pi))
    assert correlation_of(0.1, joint_share(0.1, 0.2) - 0.01) == pytest.approx(0.2, abs=1e-4)


def test_thresholds_error_is_their_lag_when_there_is_no_noise() -> None:
    placement = place(SHAPES[1], 16384)
    error = tables.threshold_error(placement, Text(), beta=0.9, drift=1e-2)
    # 0.1 sd behind, at a rate of 1/16: density over rate, times 0.1.
    cutoff = float(logit_of(1 / 16))
    slope = math.exp(-0.5 * cutoff**2) / math.sqrt(2 * math.pi) * 16
    assert error == pytest.approx(0.1 * slope, rel=1e-3)


def test_published_slowdowns_imply_one_busiest_rank(hardware: Hardware) -> None:
    implied = [point.implied(hardware) for point in published.POINTS]
    assert max(implied) / min(implied) < 1.03
    for point in published.POINTS:
        assert point.predicted(hardware, published.implied(hardware)) == pytest.approx(
            point.slowdown, rel=0.01
        )
        assert point.predicted(hardware, 1.0) == 1.0
    assert 1.0 < published.POINTS[0].simulated(Text(), 20) < 1.05
    # Uneven sequences alone would be worse where a group of ranks has one instead of two.
    uneven = published.uneven_sequences(hardware, 50)
    two, one = (point.simulated(uneven, 50) for point in published.POINTS[:2])
    assert two == pytest.approx(implied[0], abs=0.02)
    assert one > 1.1 * implied[1]


def test_even_loads_cost_nothing(hardware: Hardware) -> None:
    placement = place(SHAPES[0], 64)
    even = draw(np.random.default_rng(0), "ET", cost.group_of(placement), Text(), 10, capacity=0.0)
    assert cost.slowdown(placement, hardware, even) == cost.Slowdown(1.0, 1.0, 1.0, 1.0)
    assert cost.largest_of(1) == 0.0
    assert cost.largest_of(2) == pytest.approx(1 / math.sqrt(math.pi), rel=1e-4)


def test_measured_numbers_take_the_place_of_assumed_ones(tmp_path: Path) -> None:
    file = tmp_path / "measured.csv"
    file.write_text("name,value,source\nhbm_efficiency,0.9,copy.csv\n")
    entries, hardware = read(file)
    assert hardware["hbm_efficiency"] == 0.9
    assert [entry.source for entry in entries if entry.name == "hbm_efficiency"] == ["measured: copy.csv"]
    assert len(entries) == len(TABLE)
    file.write_text("name,value,source\nhbm_eficiency,0.9,copy.csv\n")
    with pytest.raises(ValueError, match="hbm_eficiency is no number of the model"):
        read(file)
    file.write_text("name,value,source\nhbm,0,copy.csv\n")
    with pytest.raises(ValueError, match=r"hbm is 0.0: it must be above 0"):
        read(file)


def test_measured_rows_survive_the_file(tmp_path: Path) -> None:
    found = {"vectors": {"8192": 1e-3}, "routers": {"3 x 16": {"bytes": 9.0, "group": 2e-3, "alone": 1e-3}}}
    rows = [*gloo_rows(2, found), Measured("environment", "", 0, "CPU", "a, b")]
    write_measured(rows, tmp_path / "m.csv")
    assert read_measured(tmp_path / "m.csv") == rows
    assert numbers(rows, "routers", "3 x 16", 2) == {"bytes": 9.0, "group": 2e-3, "alone": 1e-3}


def test_the_whole_report_is_written(hardware: Hardware, tmp_path: Path) -> None:
    measured = read_measured(RESULTS / "scale_measured.csv")
    rows = scale_model.rows_of(measured, hardware, 3)
    assert all(math.isfinite(row.value) for row in rows)
    again = {row[:5]: row.value for row in tables.load_rows(tables.settings(measured), hardware, 3)}
    assert again == {row[:5]: row.value for row in rows if row[:5] in again}
    text = report.write(rows, TABLE, {"Report": {"date": "today"}})
    sections = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert len(sections) == 8
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({line.count("|") for line in table.splitlines()}) == 1, table
    get = report.Rows(rows)
    for plot in (plots.statistics, plots.loads):
        plot(get, tmp_path / "plot.png")
        assert (tmp_path / "plot.png").stat().st_size > 10_000
    scale_model.write(rows, tmp_path / "model.csv")
    assert len((tmp_path / "model.csv").read_text().splitlines()) == len(rows) + 1


def test_prose_is_filled() -> None:
    assert report.prose("a\nb") == ["a b", ""]
    item = "- " + "word " * 40
    lines = report.prose(f"{item}\n- second")
    assert lines[0].startswith("- word")
    assert lines[1].startswith("  word")
    assert lines[2:] == ["- second", ""]
    assert max(map(len, lines)) <= 118


def test_the_report_has_todays_bytes(hardware: Hardware) -> None:
    """What is reduced follows from the code: run benchmarks/scale_model.py again when this fails."""
    with (RESULTS / "scale_model.csv").open() as file:
        reported = {
            (row["shape"], int(row["gpus"])): float(row["value"])
            for row in csv.DictReader(file)
            if row["quantity"] == "reduced MB"
        }
    now = {
        (shape.name, gpus): cost.statistics(place(shape, gpus), hardware).reduced_bytes / 1e6
        for shape in SHAPES
        for gpus in GPUS
    }
    assert reported == pytest.approx(now, rel=1e-5)
