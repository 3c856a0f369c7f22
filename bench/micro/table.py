"""What was measured, as tables on the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from rich.console import Console

    from interlace.microbenchmarks.measure import Record


def show_case(record: Record, console: Console) -> None:
    """Print one case: its contenders, fastest first, and what was left out."""
    table = Table(
        title=f"{record['op']} {record['direction']}: {record['case']}, {record['dtype']}",
        title_justify="left",
    )
    table.add_column("")
    for name in ("median ms", "p20..p80", "GB/s", "% copy", "TFLOP/s", "% matmul", "x best", "off"):
        table.add_column(name, justify="right")
    for row in record["rows"]:
        ratio, apart = row["ratio_to_best_baseline"], row["largest_difference"]
        table.add_row(
            f"[bold]{row['name']}[/]" if row["is_backend"] else escape(row["name"]),
            f"{row['median_ms']:.4g}",
            f"{row['p20_ms']:.4g}..{row['p80_ms']:.4g}",
            f"{row['gb_per_s']:.4g}",
            f"{row['percent_of_copy']:.1f}",
            f"{row['tflop_per_s']:.3g}",
            f"{row['percent_of_matmul']:.1f}",
            "" if ratio is None else f"{ratio:.2f}",
            "" if apart is None else f"{apart:.0e}",
        )
    console.print(table)
    for name, reason in record["left_out"].items():
        console.print(f"  left out: {name}: {reason}", markup=False, highlight=False)


def show_run(record: Record, console: Console) -> None:
    """Print where and how an op is timed."""
    ceilings, timing = record["ceilings"], record["timing"]
    console.rule(f"{record['op']} on {record['device']}, {record['dtype']}")
    console.print(
        f"copy {ceilings['copy_gb_per_s']:.4g} GB/s, matrix product "
        f"{ceilings['matmul_tflop_per_s']:.4g} TFLOP/s; {record['threads']} threads, load "
        f"{record['load_average'][0]}; {timing['clock']}; {timing['caches']}",
        highlight=False,
    )
