"""What the machine can do, measured in the same run as everything that is compared with it; clocks and reports."""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from samlet.engine.memory import keep_freed_memory

Work = Callable[[], object]


class Ceilings(NamedTuple):
    """Measured rates: floating-point operations (multiply and add counted apart) and bytes moved, each second."""

    matmul: float  # in the benchmark's precision
    copy: float  # read and written

    def limit_ms(self, flops: float) -> float:
        """No arithmetic of so many operations can be faster than this."""
        return flops / self.matmul * 1e3


class Bench:
    """Device, precision and clock of one run of a benchmark.

    On CUDA time is the wall's, between synchronisations. On a CPU `clock` "cpu" is the processor time of the
    calling thread: on a machine shared with others it is what the wall would show without them. It needs one thread.
    """

    def __init__(self, device: str, precision: str, threads: int, clock: str, repeats: int) -> None:
        self.device, self.repeats, self.clock = torch.device(device), repeats, clock
        self.precision = precision
        self.dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
        if threads:
            torch.set_num_threads(threads)
        if clock == "cpu" and (device != "cpu" or torch.get_num_threads() != 1):
            raise SystemExit("--clock cpu counts one thread of a CPU: add --device cpu --threads 1")

    def now(self) -> float:
        """Seconds, once the device has done all it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.thread_time() if self.clock == "cpu" else time.perf_counter()

    def autocast(self) -> torch.autocast:
        """The run's precision."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16")

    def seconds(self, work: Work) -> float:
        """Time of one call."""
        began = self.now()
        work()
        return self.now() - began

    def interleaved(self, works: Mapping[str, Work]) -> dict[str, float]:
        """Median milliseconds of each, called in turn so that all meet the same weather; a round of warm-up first."""
        times: dict[str, list[float]] = {name: [] for name in works}
        for repeat in range(self.repeats + 1):
            for name, work in works.items():
                spent = self.seconds(work)
                if repeat:
                    times[name].append(spent * 1e3)
        return {name: statistics.median(spent) for name, spent in times.items()}

    def ceilings(self) -> Ceilings:
        """Best of several multiplications of square matrices and copies of a tensor that no cache holds."""
        side = 8192 if self.device.type == "cuda" else 1024
        a = torch.randn(side, side, device=self.device, dtype=self.dtype)
        source = torch.ones(2**28 if self.device.type == "cuda" else 2**25, device=self.device)
        target = torch.empty_like(source)
        product = min(self.seconds(lambda: a @ a) for _ in range(12))
        copy = min(self.seconds(lambda: target.copy_(source)) for _ in range(6))
        return Ceilings(2 * side**3 / product, 2 * source.nbytes / copy)

    def peak_memory(self) -> float | None:
        """Most GiB that tensors held on the GPU since the last call; None on a CPU."""
        if self.device.type != "cuda":
            return None
        peak = torch.cuda.max_memory_allocated(self.device) / 2**30
        torch.cuda.reset_peak_memory_stats(self.device)
        return peak

    def facts(self, ceilings: Ceilings) -> dict[str, Any]:
        """The machine in words and its ceilings."""
        return {
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "processor": _processor(),
            "gpu": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else None,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "precision": self.precision,
            "clock": {"cpu": "processor time of one thread", "wall": "wall"}[self.clock],
            "repeats": self.repeats,
            "matmul_gflops": round(ceilings.matmul / 1e9, 1),
            "copy_gb_per_s": round(ceilings.copy / 1e9, 1),
        }


def add_options(parser: argparse.ArgumentParser) -> None:
    """What every benchmark can be told."""
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: CUDA where there is")
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto", help="auto: bf16 on CUDA")
    parser.add_argument("--threads", type=int, default=0, help="of the CPU; 0: as torch finds it")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: processor time of one thread")
    parser.add_argument("--repeats", type=int, default=5, help="measurements of each; the median counts")
    parser.add_argument(
        "--memory",
        choices=["kept", "returned"],
        default="kept",
        help="what the C library does with freed memory on a CPU; kept: as in training, returned: as it comes",
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile the image encoders")
    parser.add_argument("--tiny", action="store_true", help="tiny models: does it run, not how fast")
    parser.add_argument("--json", type=Path, help="write the figures here, and the table beside it as Markdown")


def start(options: argparse.Namespace) -> Bench:
    """The bench that the options ask for.

    Raises:
        SystemExit: CUDA was asked for and there is none.
    """
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: there is no CUDA GPU here; nothing was measured")
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    precision = options.precision
    if precision == "auto":
        precision = "bf16" if device == "cuda" else "fp32"
    if device == "cpu" and options.memory == "kept":
        keep_freed_memory()
    return Bench(device, precision, options.threads, options.clock, options.repeats)


def flops_of(work: Work) -> int:
    """Floating-point operations of matrix products, convolutions and attention, multiply and add counted apart."""
    # The counter follows modules through their inputs' graph, so it needs one.
    with torch.enable_grad(), FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())


def largest_error(ours: Tensor, reference: Tensor) -> float:
    """Largest difference in units of the reference's largest value."""
    return float((ours.float() - reference.float()).abs().max() / reference.float().abs().max())


class Report:
    """A table of figures, on the screen, as JSON and as Markdown."""

    def __init__(self, title: str, command: str, facts: dict[str, Any]) -> None:
        self.title, self.command, self.facts = title, command, facts
        self.tables: list[tuple[str, Sequence[str], list[list[str]]]] = []
        self.figures: dict[str, Any] = {}

    def table(self, name: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Numbers are shown to three digits."""
        self.tables.append((name, header, [[_shown(cell) for cell in row] for row in rows]))

    def finish(self, path: Path | None) -> None:
        """Print, and write where asked."""
        console = Console()
        console.print(f"[bold]{self.title}[/]: " + ", ".join(f"{k} {v}" for k, v in self.facts.items() if v))
        for name, header, rows in self.tables:
            table = Table(*header, title=name)
            for row in rows:
                table.add_row(*row)
            console.print(table)
        for name, value in self.figures.items():
            console.print(f"{name}: {_shown(value)}")
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            tables = [{"name": n, "rows": [dict(zip(h, r, strict=True)) for r in rows]} for n, h, rows in self.tables]
            content = {"command": self.command, "machine": self.facts, "figures": self.figures, "tables": tables}
            path.write_text(json.dumps(content, indent=1) + "\n")
            path.with_suffix(".md").write_text(self._markdown())

    def _markdown(self) -> str:
        lines = [f"# {self.title}", "", f"`{self.command}`", ""]
        lines += [f"* {name}: {value}" for name, value in self.facts.items() if value]
        for name, header, rows in self.tables:
            lines += ["", f"## {name}", "", f"| {' | '.join(header)} |", "|" + " --- |" * len(header)]
            lines += [f"| {' | '.join(row)} |" for row in rows]
        lines += ["", *(f"* {name}: {_shown(value)}" for name, value in self.figures.items())]
        return "\n".join(lines) + "\n"


def _shown(value: object) -> str:
    if not isinstance(value, float):
        return "" if value is None else str(value)
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _processor() -> str:
    listing = Path("/proc/cpuinfo")
    if listing.exists():
        for line in listing.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
