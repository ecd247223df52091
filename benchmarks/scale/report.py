"""scale_model.md from the rows of the tables."""

import re
import textwrap
from collections.abc import Callable, Iterable, Sequence

from benchmarks.scale import check, memory, runs, tables
from benchmarks.scale.assumptions import Assumption
from benchmarks.scale.cost import TARGET
from benchmarks.scale.published import POINTS
from benchmarks.scale.shapes import GPUS, SHAPES, SOURCES
from benchmarks.scale.tables import LOAD_GPUS, Row

MODEL = f"""
- **Step time**: FLOPs of the global batch (6 per active weight, causal attention) over the published
  TFLOP/s, the same for every number of GPUs. The global batch is the published one, or larger where a
  pipeline would have fewer micro-batches than stages: the shortest step that a layout allows, which is
  the worst for the statistics.
- **Statistics**: bytes are those of the classes (`megatron_et/check/sizes.py`); operations, bytes and
  memory of counting and of the boundary were counted by running the real code. Nothing is taken as hidden
  unless it is said, though the statistics travel beside the gradients' reduction and the optimizer step.
- **Counting** with `--moe-et-kernels torch` is so many bytes at HBM speed; with `triton` and `cuda` what
  it adds to routing on an H100 (16,384 tokens, 128 experts: [kernel times](kernel_times.md)).
- **All-reduce**: hops and bytes over NVLink and NICs as a ring, a tree over nodes, and reduce-scatter +
  tree + all-gather; the fastest counts. No SHARP, no contention.
- **Loads**: a token's logit is normal; a share `own` of its variance is common to a sequence's tokens for
  each expert separately, a share `common` for all experts. Layers, sequences and experts are independent
  otherwise. ET: thresholds at the target rate, with the error of beta {tables.BETA} at a drift of
  {tables.DRIFT:g} sd a batch. Top-k: mean field.
- **Busiest rank**: rows that the busiest rank of an expert-parallel group receives, over forced balance;
  all its ranks wait for it in every layer. **Busiest direction**: the larger of rows sent and received by
  any rank.
- **Step**: grouped GEMMs at the assumed efficiency, scaled by the busiest rank; the all-to-all either
  hidden or not. Inside a node every row is sent, across nodes a token once to each node that needs it.
- **Memory**: rows kept for the backward pass by the first pipeline stage, which holds as many
  micro-batches as there are stages: about as many layer-micro-batches as the model has MoE layers. A
  sequence's common part is the same in all layers, everything else is independent, as measured below.
  Chernoff's bound, so the true need is somewhat less.
"""


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]], *, words: bool = False) -> list[str]:
    """A table and an empty line; all columns but the first are numbers, unless they are words."""
    rule = ["---"] + ["---" if words else "---:"] * (len(head) - 1)
    return [f"| {' | '.join(cells)} |" for cells in (head, rule, *rows)] + [""]


def prose(text: str) -> list[str]:
    """A paragraph, or a list of `- ` items, filled, and an empty line."""
    items = re.split(r"\n(?=- )", text.strip())
    lines = []
    for item in items:
        indent = "  " if item.startswith("- ") else ""
        words = " ".join(item.split())
        lines += textwrap.wrap(
            words, 118, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
        )
    return [*lines, ""]


class Rows:
    """Looked up by what they say."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._values = {row[:5]: row.value for row in rows}
        self.rows = rows

    def __call__(self, table: str, shape: str, gpus: int, setting: str, quantity: str) -> float:
        return self._values[table, shape, gpus, setting, quantity]

    def settings(self, table: str) -> list[str]:
        """In order of appearance."""
        return list(dict.fromkeys(row.setting for row in self.rows if row.table == table))

    def statistic(self, shape: str, gpus: int, quantity: str) -> tuple[float, str]:
        """Of the statistics table: the value and the fastest algorithm."""
        return next(
            (row.value, row.setting)
            for row in self.rows
            if row[:3] == ("statistics", shape, gpus) and row.quantity == quantity
        )


def percent(value: float, digits: int = 1) -> str:
    """A share."""
    return f"{100 * value:.{digits}f} %"


def write(
    rows: Sequence[Row], assumptions: Sequence[Assumption], environments: dict[str, dict[str, str]]
) -> str:
    """The whole page."""
    get = Rows(rows)
    parts: list[Callable[[Rows], list[str]]] = [
        _findings, _shapes, _statistics, _sensitivity, _loads, _thresholds, _memory, _capacity, _checks
    ]  # fmt: skip
    lines = [
        "# The statistics, the loads and the memory at scale: a model",
        "",
        "Written by `python benchmarks/scale_model.py` (csv and plots beside it). **A model on paper and by",
        "simulation.** Times of kernels are from one H100; of the rest, what could be checked on CPU, and",
        "against one published measurement, is in the last section.",
        "",
    ]
    for part in parts:
        lines += part(get)
    lines += [
        "## Assumptions",
        "",
        MODEL.strip(),
        "",
        "Sources of sizes, layouts and speeds:",
        SOURCES.rstrip(),
        "",
    ]
    head = ["number", "value", "what", "source"]
    lines += markdown(head, [[a.name, f"{a.value:g}", a.what, a.source] for a in assumptions], words=True)
    lines += ["`--measured FILE.csv` (name, value, source) puts measured numbers in their place.", ""]
    for name, values in environments.items():
        lines += [f"{name}: " + "; ".join(f"{key} {value}" for key, value in values.items()) + ".", ""]
    return "\n".join(lines).rstrip() + "\n"


def _listed(gpus: Sequence[int]) -> str:
    *first, last = (f"{number:,}" for number in gpus)
    return f"{', '.join(first)} and {last}" if first else last


def _findings(get: Rows) -> list[str]:
    most = GPUS[-1]
    holds = [
        (shape.name, gpus)
        for shape in SHAPES
        for gpus in GPUS
        if get.statistic(shape.name, gpus, "once share")[0] < TARGET
    ]
    worst = max(SHAPES, key=lambda shape: get.statistic(shape.name, most, "once share")[0]).name
    missed = {s.name: [g for g in GPUS if (s.name, g) not in holds] for s in SHAPES}
    misses = [f"{name} on {_listed(gpus)}" for name, gpus in missed.items() if gpus]

    def once(name: str) -> str:
        return percent(get("sensitivity", worst, most, name, "once share"), 2)

    reduced, algorithm = get.statistic(worst, most, "reduced MB")
    counting = {
        kernels: [
            get.statistic(s.name, most, f"share with {kernels}")[0]
            - get.statistic(s.name, most, "once share")[0]
            for s in SHAPES
        ]
        for kernels in ("torch", "triton", "cuda")
    }

    all_below = {
        kernels: [
            (s.name, gpus)
            for s in SHAPES
            for gpus in GPUS
            if get.statistic(s.name, gpus, f"share with {kernels}")[0] < TARGET
        ]
        for kernels in counting
    }

    behind = [
        (s.name, gpus)
        for s in SHAPES
        for gpus in GPUS
        if get.statistic(s.name, gpus, "share of the boundary")[0] < TARGET
    ]

    def span(setting: str, quantity: str, table: str = "loads") -> str:
        values = [get(table, s.name, LOAD_GPUS, setting, quantity) for s in SHAPES]
        return f"{min(values):.2f} to {max(values):.2f}"

    implied = [
        get("natural routing", "Qwen3-235B-A22B", 256, f"sequences of {p.sequence}", "implied busiest rank")
        for p in POINTS
    ]
    tiny, uneven = "ET, text of the tiny GPT", "ET, uneven text (0.5 sd)"
    topk = "top-k + aux loss, text of the tiny GPT"
    traced = get("measured", "ET, C=0.5", 4, "", "at capacity bound, traced")
    dropped = [get("C=0.5", s.name, LOAD_GPUS, tiny, "dropped") for s in SHAPES]
    acts = [get("C=0.5", s.name, LOAD_GPUS, uneven, "acts") for s in SHAPES]
    torch, triton, cuda = (f"{percent(min(c), 2)} to {percent(max(c), 2)}" for c in counting.values())
    return [
        "## What it says",
        "",
        *prose(f"""
- **Reduction + boundary stay below {percent(TARGET)} of a step in {len(holds)} of
  {len(SHAPES) * len(GPUS)} cases** (shapes x GPUs, nothing hidden). Not for {"; ".join(misses)}: there
  the batch is as small as the layout allows and the step short. The worst, {worst} on {most:,} GPUs:
  {reduced:.0f} MB by {algorithm}, {once("as assumed")}; with the reduction hidden
  {once("the reduction hidden")}. With it hidden, as it can be behind the optimizer step, {len(behind)} cases
  stay below. int64 counts in 1,024 bins would make it {once("int64 counts, 1,024 bins")}, a tenth of the
  small kernels at the boundary {once("a tenth of the kernels")}, and with the reduction hidden
  {once("a tenth of the kernels, the reduction hidden")}. A global batch 4 times as large:
  {once("global batch 4 times as large")}.
- **Counting**, at every scale alike: {torch} of a step with `--moe-et-kernels torch`, {triton}
  with `triton`, {cuda} with `cuda`. Everything together is below {percent(TARGET)} in
  {len(all_below["torch"])}, {len(all_below["triton"])} and {len(all_below["cuda"])} of the cases.
- **Busiest rank under ET**: {span("ET, independent tokens", "grouped_gemm")} of forced balance if tokens
  were independent, {span(tiny, "grouped_gemm")} with the text of the tiny GPT (top-k with auxiliary loss
  on the same text: {span(topk, "grouped_gemm")}), {span(uneven, "grouped_gemm")} if sequences are as
  uneven as docs/choosing.md supposes. Step, all-to-all hidden: {span(tiny, "step_hidden")}
  ({span(topk, "step_hidden")}) and {span(uneven, "step_hidden")}.
- **What a rank sends** is fixed by top-k and not by ET: sequences differ in fan-out. With the text of the
  tiny GPT the busiest direction is {span(tiny, "all_to_all")} ({span(topk, "all_to_all")}), so that a
  step whose all-to-all is not hidden takes {span(tiny, "step_exposed")} ({span(topk, "step_exposed")}).
- **Natural top-k, published**: the slowdowns at four sequence lengths imply one and the same busiest
  rank, {min(implied):.2f} to {max(implied):.2f}. It does not grow from two sequences a group to a part of
  one, so it looks like unequal popularity of experts, which thresholds remove, rather than uneven
  sequences, which they do not. (Any other cost of natural routing that is the same for every token would
  look like this, too; how far that model was trained is not said.) That ET would gain most of what forced
  balance gains is a conclusion, not a measurement.
- **Capacity with the pool `microbatch` is no rare guard when a micro-batch is one sequence**: at C=0.5 it
  acts on {percent(min(acts), 0)} to {percent(max(acts), 0)} of experts and micro-batches of uneven text,
  and there routes by rank in the pool, not by threshold; with the text of the tiny GPT it drops
  {percent(min(dropped), 0)} to {percent(max(dropped), 0)} of the rows. (Measured on the tiny GPT, 4
  sequences a micro-batch: it acts on {percent(traced, 0)}.) The bound 1 + C is hard for this pool only: a
  global pool bounds an expert's sum over all ranks, not what one expert-parallel group sends.
- **Head-room without capacity**, {tables.STEPS:,} steps on {LOAD_GPUS:,} GPUs, P(out of memory) <
  {tables.PROBABILITY:g}: with the text of the tiny GPT {span(tiny, "kept", "head-room")} times the mean
  for the rows that are kept ({span(topk, "kept", "head-room")} for top-k with auxiliary loss, an upper
  bound), {span(tiny, "one layer", "head-room")} ({span(topk, "one layer", "head-room")}) for the buffers
  of one layer. ET needs the most where a rank holds a single micro-batch (no pipeline): its fan-out is
  alike in all layers and nothing averages it out.
"""),
    ]


def _shapes(get: Rows) -> list[str]:
    lines = ["## Shapes and layouts", ""]
    rows = []
    for shape in SHAPES:
        total, active = shape.published
        numbers = [get("shape", shape.name, 0, "", name) for name in ("total", "active", "GFLOP a token")]
        layout = shape.layout
        rows.append([
            shape.name,
            f"{numbers[0]:.1f} ({total:g})",
            f"{numbers[1]:.2f} ({active:g})",
            f"{numbers[2]:.0f}",
            percent(get("shape", shape.name, 0, "", "expert share"), 0),
            f"{shape.moe_layers} x {shape.experts}, {shape.topk}",
            f"TP{layout.tp} PP{layout.pp} EP{layout.ep}",
            f"{layout.sequences:,}",
            f"{shape.tflops:.0f}",
        ])  # fmt: skip
    head = ["", "total B (published)", "active B (published)", "GFLOP a token", "in experts"]
    head += ["layers x experts, topk", "layout", "sequences of 4,096", "TFLOP/s a GPU"]
    lines += markdown(head, rows)
    lines += ["Step in seconds / weights, gradients and optimizer in GB a GPU (over 80: does not fit):", ""]
    rows = [
        [
            shape.name,
            *(
                f"{get('placement', shape.name, gpus, '', 'step'):.2f} / "
                f"{get('placement', shape.name, gpus, '', 'static GB'):.0f}"
                for gpus in GPUS
            ),
        ]
        for shape in SHAPES
    ]
    return lines + markdown(["GPUs", *(f"{gpus:,}" for gpus in GPUS)], rows)


def _statistics(get: Rows) -> list[str]:
    lines = ["## Cost of the statistics", ""]
    lines += ["![share of a step](scale_statistics.png)", ""]
    lines += prose("""
Once a step, whatever the number of tokens. `memory`: most that the accumulators, the vector that is sent
and the quantile's temporaries hold at once. `+ torch`, `+ triton`, `+ cuda`: with the counting of all
micro-batches.
""")
    rows = []
    for shape in SHAPES:
        for gpus in GPUS:
            now = {
                name: get.statistic(shape.name, gpus, name)[0]
                for name in (
                    "reduced MB", "memory MB", "ring ms", "tree ms", "hierarchical ms", "boundary ms",
                    "once share", "share with torch", "share with triton", "share with cuda",
                )
            }  # fmt: skip
            shares = [
                percent(now[name], 3)
                for name in ("once share", "share with torch", "share with triton", "share with cuda")
            ]
            if now["once share"] >= TARGET:
                shares[0] = f"**{shares[0]}**"
            rows.append([
                shape.name, f"{gpus:,}", f"{now['reduced MB']:.1f}", f"{now['memory MB']:.0f}",
                f"{now['ring ms']:.2f} / {now['tree ms']:.2f} / {now['hierarchical ms']:.2f}",
                f"{now['boundary ms']:.2f}", *shares,
            ])  # fmt: skip
    head = ["", "GPUs", "reduced MB", "memory MB", "ring / tree / hierarchical ms", "boundary ms"]
    return lines + markdown([*head, "share of the step", "+ torch", "+ triton", "+ cuda"], rows)


def _sensitivity(get: Rows) -> list[str]:
    lines = [f"Share of reduction + boundary on {GPUS[-1]:,} GPUs when one thing is different:", ""]
    rows = [
        [name, *(percent(get("sensitivity", s.name, GPUS[-1], name, "once share"), 3) for s in SHAPES)]
        for name in get.settings("sensitivity")
    ]
    return lines + markdown(["", *(shape.name for shape in SHAPES)], rows)


def _loads(get: Rows) -> list[str]:
    lines = ["## Imbalance of the all-to-all and of the experts", "", "![loads](scale_loads.png)", ""]
    lines += prose("""
Busiest rank / busiest direction, over forced balance, mean over layers; then the sd of all rows of a
group, in % (top-k: 0, its sum is fixed).
""")
    names = get.settings("loads")

    def cells(make: Callable[[str, str], str]) -> list[list[str]]:
        return [[name, *(make(shape.name, name) for shape in SHAPES)] for name in names]

    def load(quantity: str, shape: str, name: str) -> float:
        return get("loads", shape, LOAD_GPUS, name, quantity)

    head = ["", *(f"{shape.name}, EP{shape.layout.ep}" for shape in SHAPES)]
    lines += markdown(
        head,
        cells(
            lambda s, n: (
                f"{load('grouped_gemm', s, n):.3f} / {load('all_to_all', s, n):.3f}; "
                f"{100 * load('total sd', s, n):.1f}"
            )
        ),
    )
    lines += [
        f"Step time over forced balance on {LOAD_GPUS:,} GPUs, all-to-all hidden / not hidden (from "
        f"{GPUS[0]} to {GPUS[-1]:,} GPUs these change by at most {_largest_change(get):.3f}):",
        "",
    ]
    steps = cells(lambda s, n: f"{load('step_hidden', s, n):.3f} / {load('step_exposed', s, n):.3f}")
    natural = [
        f"{get('published loads', s.name, LOAD_GPUS, tables.AS_PUBLISHED, 'step_hidden'):.3f} / "
        f"{get('published loads', s.name, LOAD_GPUS, tables.AS_PUBLISHED, 'step_exposed'):.3f}"
        for s in SHAPES
    ]
    lines += markdown(head, [*steps, [tables.AS_PUBLISHED, *natural]])
    shares = [
        f"{s.name} {percent(get('exposure', s.name, LOAD_GPUS, '', 'grouped GEMM'), 0)} / "
        f"{percent(get('exposure', s.name, LOAD_GPUS, '', 'all-to-all'), 0)}"
        for s in SHAPES
    ]
    return [
        *lines,
        f"Share of the step, grouped GEMMs / all-to-all, under forced balance: {', '.join(shares)}.",
        "",
    ]


def _largest_change(get: Rows) -> float:
    return max(
        abs(
            get("loads", s.name, gpus, name, "step_hidden")
            - get("loads", s.name, LOAD_GPUS, name, "step_hidden")
        )
        for s in SHAPES
        for name in get.settings("loads")
        for gpus in GPUS
    )


def _thresholds(get: Rows) -> list[str]:
    lines = [
        f"Rms load error of thresholds, global batch of {LOAD_GPUS:,} GPUs, beta 0.9 / 0.99 / 0.999:",
        "",
    ]
    rows = [
        [
            name,
            *(
                " / ".join(
                    percent(get("thresholds", shape.name, LOAD_GPUS, name, f"beta {beta}"))
                    for beta in (0.9, 0.99, 0.999)
                )
                for shape in SHAPES
            ),
        ]
        for name in get.settings("thresholds")
    ]
    lines += markdown(["", *(shape.name for shape in SHAPES)], rows)
    return lines + prose("""
Errors of single experts average out over a rank's experts. A drift of all experts in one direction does
not: then every rank has that much more, or less, than the target.
""")


def _memory(get: Rows) -> list[str]:
    lines = ["## Memory", "", "Routed rows kept for the backward pass, GB a GPU at forced balance:", ""]
    rows = [
        [kept.name, *(f"{get('rows', s.name, LOAD_GPUS, kept.name, 'GB at the mean'):.1f}" for s in SHAPES)]
        for kept in memory.KEPT
    ]
    lines += markdown(["kept", *(shape.name for shape in SHAPES)], rows)
    lines += prose(f"""
Head-room, times the mean, for {tables.STEPS:,} steps on {LOAD_GPUS:,} GPUs with P(out of memory) <
{tables.PROBABILITY:g}: of the rows that are kept (in bf16) / of one layer's, which its buffers need, and
which is all there is when MoE layers are recomputed.
""")
    names = get.settings("head-room")
    rows = [
        [
            name,
            *(
                f"{get('head-room', s.name, LOAD_GPUS, name, 'kept'):.2f} "
                f"(+{_more(get, s.name, name):.1f} GB) / "
                f"{get('head-room', s.name, LOAD_GPUS, name, 'one layer'):.2f}"
                for s in SHAPES
            ),
        ]
        for name in names
    ]
    lines += markdown(["", *(shape.name for shape in SHAPES)], rows)
    return lines + prose("""
Top-k's sum over experts is fixed and only its skew varies: a rank is far off when its experts are. ET's
sum varies too, so all ranks of a group can be above the mean at once. Top-k's numbers are upper bounds.
With a capacity C (pool `microbatch`) a rank never has more than 1 + C, whatever the text. The text of the
tiny GPT is that of sequences of 256 tokens early in a training; longer sequences of a trained model are
likely to be less uneven.
""")


def _more(get: Rows, shape: str, name: str) -> float:
    """GB above the mean of the rows kept in bf16."""
    kept = get("rows", shape, LOAD_GPUS, memory.KEPT[0].name, "GB at the mean")
    return kept * (get("head-room", shape, LOAD_GPUS, name, "kept") - 1.0)


def _capacity(get: Rows) -> list[str]:
    lines = ["## What capacity buys", ""]
    lines += prose("""
`--moe-et-capacity-factor C`, pool `microbatch` of one sequence (shared by the tensor-parallel ranks).
Head-room of kept rows / of one layer, the smaller of 1 + C and that without; busiest rank; share of
experts and micro-batches where the bound acts / rows dropped / filled in, % of all.
""")
    names = [name for name in get.settings("head-room") if name.startswith("ET")]
    for name in names:
        rows = []
        for capacity in tables.CAPACITIES:
            cells = []
            for shape in SHAPES:
                key = (f"C={capacity}", shape.name, LOAD_GPUS, name)
                rooms = " / ".join(
                    f"{min(1.0 + capacity, get('head-room', shape.name, LOAD_GPUS, name, what)):.2f}"
                    for what in ("kept", "one layer")
                )
                moved = " / ".join(f"{100 * get(*key, what):.1f}" for what in ("acts", "dropped", "filled"))
                cells.append(f"{rooms}; {get(*key, 'busiest rank'):.3f}; {moved}")
            rows.append([f"{capacity}", *cells])
        free = [
            f"{get('head-room', s.name, LOAD_GPUS, name, 'kept'):.2f} / "
            f"{get('head-room', s.name, LOAD_GPUS, name, 'one layer'):.2f}; "
            f"{get('loads', s.name, LOAD_GPUS, name, 'grouped_gemm'):.3f}; 0 / 0 / 0"
            for s in SHAPES
        ]
        rows.append(["none", *free])
        lines += [f"{name}:", "", *markdown(["C", *(shape.name for shape in SHAPES)], rows)]
    return lines


def _checks(get: Rows) -> list[str]:
    lines = ["## Checks", "", "### All-reduce: seconds = latency + bytes / speed, on gloo", ""]
    lines += prose("""
The line is fitted to plain int64 vectors of 8 KiB to 16 MiB; then the statistics of real routers are
reduced by `synchronize.start_reduction` (less the time of the same without a group).
""")
    rows = []
    for ranks in (2, 4):
        line = [
            get("gloo", "", ranks, "", name) for name in ("latency ms", "MB/s", "largest error of the line")
        ]
        for name in get.settings("gloo")[1:]:
            found = [get("gloo", "", ranks, name, what) for what in ("MB", "measured ms", "predicted ms")]
            rows.append([
                f"{ranks}", f"{line[0]:.2f} ms, {line[1]:.0f} MB/s", percent(line[2], 0), name,
                f"{found[0]:.2f}", f"{found[1]:.2f}", f"{found[2]:.2f}", f"{found[2] / found[1]:.2f}",
            ])  # fmt: skip
    head = ["processes", "line", "its largest error", "routers", "MB", "measured ms", "predicted ms", "ratio"]
    lines += [
        *markdown(head, rows),
        "Two cores: four processes share them, and other work went on beside.",
        "",
    ]
    lines += _run_checks(get)
    return lines + _published_check(get)


def _run_checks(get: Rows) -> list[str]:
    lines = ["### Loads of real training", ""]
    lines += prose(f"""
Megatron on CPU, the quickstart's GPT on its text (code and prose): {runs.EXPERTS} experts, topk
{runs.TOPK}, {runs.SEQUENCES} sequences of {runs.SEQUENCE} tokens a rank and step, expert parallel over
all ranks; {runs.STEPS} steps, the first {runs.WARMUP + runs.SETTLE} left out. Text fitted to every other
step of the rest, loads of the steps between.
""")
    names = ("own", "common", "dispersion", "wander", "sway", "level")
    fitted = [
        [f"{router}, EP{ranks}", *(f"{get('text', router, ranks, '', name):.3f}" for name in names)]
        for router in ("ET", "top-k")
        for ranks in (2, 4)
    ]
    lines += markdown(["text", *names], fitted)
    columns = ("measured", "predicted", "predicted from the other run", "predicted, independent tokens")
    quantities = list(check.summary(check.predicted("ET", 2, tables.UNEVEN)))
    for router in ("ET", "top-k"):
        rows = [
            [f"EP{ranks}: {what}", *(f"{get(column, router, ranks, '', what):.3f}" for column in columns)]
            for ranks in (2, 4)
            for what in quantities
        ]
        name = "ET" if router == "ET" else "top-k with auxiliary loss 1e-2"
        lines += [f"{name}:", "", *markdown(["", *columns], rows)]
    capped = "ET, C=0.5"
    rows = [
        [what, f"{get('measured', capped, 4, '', what):.3f}", f"{get('predicted', capped, 4, '', what):.3f}"]
        for what in ("busiest rank, mean", "busiest rank, 90 % quantile", "at capacity bound, traced")
    ]
    lines += ["ET with C=0.5, EP4, predicted from the text of the run without:", ""]
    lines += markdown(["", "measured", "predicted"], rows)
    lines += prose("""
Variance of a sum over the 3 MoE layers, over that of independent layers (3 if they went alike): of how a
rank differs from the mean of the ranks, of how a sequence's fan-out differs from its step's mean, of the
steps' means.
""")
    rows = []
    for router in ("ET", "top-k"):
        for ranks in (2, 4):
            found = numbers_of(get, "measured", router, ranks)
            cells = [found.get(f"layers together, {what}") for what in ("ranks", "sequences", "steps")]
            rows.append([f"{router}, EP{ranks}", *("-" if cell is None else f"{cell:.2f}" for cell in cells)])
    return lines + markdown(["layers together", "ranks", "sequences", "steps"], rows)


def numbers_of(get: Rows, table: str, shape: str, gpus: int) -> dict[str, float]:
    """quantity -> value."""
    return {row.quantity: row.value for row in get.rows if row[:3] == (table, shape, gpus)}


def _published_check(get: Rows) -> list[str]:
    shape = "Qwen3-235B-A22B"
    busiest, own = (
        get("natural routing", shape, 256, "", name)
        for name in ("one busiest rank", "own of uneven sequences")
    )
    lines = ["### Natural routing against forced balance, published", ""]
    lines += prose(f"""
{shape}, 256 H100s, TP4 PP8 EP8 (Megatron-MoE-ModelZoo, best_practice/Qwen3): top-k with auxiliary loss,
step time over forced balance. Predicted three ways: with one busiest rank for all, {busiest:.2f}; with
uneven sequences and equally popular experts, own = {own:.2f} fitted to the first row (a group of ranks
has parts of two sequences there, of one below, and would be more uneven); with the text of the tiny GPT.
The assumed efficiencies decide the size of the busiest rank; that it is the same for all four is no
assumption.
""")
    columns = (
        "published",
        "implied busiest rank",
        "one busiest rank",
        "uneven sequences",
        "text of the tiny GPT",
    )
    rows = [
        [
            f"{point.sequence:,}",
            *(
                f"{get('natural routing', shape, 256, f'sequences of {point.sequence}', what):.3f}"
                for what in columns
            ),
        ]
        for point in POINTS
    ]
    return lines + markdown(["tokens of a sequence", *columns], rows)
