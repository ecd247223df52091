"""Numbers of the hardware, most of them not measured here. A file of measured ones takes their place:
columns name, value, source; a line `hbm_efficiency,0.82,copy_h100.csv` is one number.
"""

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.scale.network import Network


@dataclass(frozen=True)
class Assumption:
    """One number, in SI units, and where it is from."""

    name: str
    value: float
    what: str
    source: str


SHEET, NCCL, GUESS = "H100 SXM data sheet", "NCCL's tuning.cc: ring, Simple", "assumption"
MEASURED = "measured on an H100: results/kernel_times.md, results/router_cuda.md"
TABLE = (
    Assumption("nvlink", 450e9, "NVLink 4, bytes/s of a GPU in one direction", SHEET),
    Assumption("nvlink_efficiency", 0.8, "of it that collectives reach", f"{GUESS}; NCCL issue 1264: 0.83"),
    Assumption("nic", 50e9, "NDR InfiniBand, bytes/s of a GPU's NIC in one direction", "DGX H100 data sheet"),
    Assumption("nic_efficiency", 0.85, "of it that collectives reach", GUESS),
    Assumption("nvlink_hop", 3.4e-6, "seconds of a step inside a node", NCCL),
    Assumption("nic_hop", 9.6e-6, "seconds of a step between nodes", NCCL),
    Assumption("collective_launch", 8.4e-6, "seconds before a collective starts", NCCL),
    Assumption("hbm", 3.35e12, "HBM3, bytes/s", SHEET),
    Assumption("hbm_efficiency", 0.84, "of it that a copy of 176 MB reaches", MEASURED),
    Assumption("kernel_launch", 4.3e-6, "seconds of a small kernel at the boundary: 355 us for 83", MEASURED),
    Assumption("triton_pair", 1.34e-11, "seconds to count a logit beside routing it, Triton", MEASURED),
    Assumption("cuda_pair", 2.5e-12, "seconds to count a logit beside routing it, CUDA kernel", MEASURED),
    Assumption("peak_bf16", 989e12, "FLOP/s, dense", SHEET),
    Assumption("peak_fp8", 1979e12, "FLOP/s, dense", SHEET),
    Assumption("gemm_efficiency", 0.55, "of the peak that grouped GEMMs reach", GUESS),
)  # fmt: skip


@dataclass(frozen=True)
class Hardware:
    """All assumptions by name."""

    values: Mapping[str, float]

    def __getitem__(self, name: str) -> float:
        return self.values[name]

    @property
    def network(self) -> Network:
        """Links."""
        return Network(
            nvlink=self["nvlink"] * self["nvlink_efficiency"],
            nic=self["nic"] * self["nic_efficiency"],
            nvlink_hop=self["nvlink_hop"],
            nic_hop=self["nic_hop"],
            launch=self["collective_launch"],
        )

    def copying(self, size: float) -> float:
        """Seconds to read and write this many bytes of device memory."""
        return size / (self["hbm"] * self["hbm_efficiency"])

    def multiplying(self, flops: float, fp8: bool) -> float:
        """Seconds of grouped GEMMs."""
        return flops / (self["peak_fp8" if fp8 else "peak_bf16"] * self["gemm_efficiency"])

    def changed(self, **factors: float) -> "Hardware":
        """With some numbers multiplied."""
        return Hardware({name: value * factors.get(name, 1.0) for name, value in self.values.items()})


def read(measured: Path | None = None) -> tuple[tuple[Assumption, ...], Hardware]:
    """The table, with the numbers of a measured file in place of assumed ones.

    Raises:
        ValueError: the file names a number that the model does not have, or a value that is not above 0.
    """
    table = {entry.name: entry for entry in TABLE}
    if measured is not None:
        with measured.open() as file:
            for row in csv.DictReader(file):
                name, value = row["name"], float(row["value"])
                if name not in table:
                    raise ValueError(f"{measured}: {name} is no number of the model: use {', '.join(table)}")
                if not value > 0.0:
                    raise ValueError(f"{measured}: {name} is {value}: it must be above 0")
                table[name] = Assumption(name, value, table[name].what, f"measured: {row['source']}")
    entries = tuple(table.values())
    return entries, Hardware({entry.name: entry.value for entry in entries})
