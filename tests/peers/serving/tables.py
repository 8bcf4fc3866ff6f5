"""Aims, and tables of what was measured, predicted and meant."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.peers.serving.contestants import APART, CONTESTANTS, DIFFUSERS, OURS, WHOLE
from tests.peers.serving.measure import RAMP, Cell
from tests.peers.serving.queueing import Rates, predict, replayed
from tests.serving.load_client import STEPS, percentile

SHORT, LONG = min(STEPS), max(STEPS)
CLIENTS = 8
Closed = Mapping[str, Mapping[int, Cell]]
Open = Mapping[str, Mapping[float, Cell]]


@dataclass(frozen=True)
class Aim:
    """A ratio that is aimed at.

    Attributes:
        what: in words.
        least, most: the bound; the other one is None.
        value: None where it was not measured.
        spread: of the rounds.
    """

    what: str
    least: float | None
    most: float | None
    value: float | None = None
    spread: tuple[float, float] | None = None

    @property
    def met(self) -> bool | None:
        """None where it was not measured."""
        if self.value is None or math.isnan(self.value):
            return None
        return self.value >= self.least if self.least is not None else self.value <= (self.most or 0.0)

    def to_json(self) -> dict[str, Any]:
        """Fields and verdict."""
        return {**dataclasses.asdict(self), "met": self.met}


def faster(closed: Closed, name: str, least: float) -> Aim:
    """Images each second of ours against another's, at 8 clients."""
    aim = Aim(f"images/s at {CLIENTS} clients, over {CONTESTANTS[name].title}", least, None)
    ours, other = closed.get(OURS, {}).get(CLIENTS), closed.get(name, {}).get(CLIENTS)
    if ours is None or other is None or not all(other.ended):
        return aim
    ratios = [a / b for a, b in zip(ours.by_round, other.by_round, strict=False)]
    return dataclasses.replace(aim, value=ours.images_per_second / other.images_per_second,
                               spread=(min(ratios), max(ratios)))


def shorter(what: str, ours: Cell | None, other: Cell | None) -> Aim:
    """The 95th percentile of short requests of ours against that of whole batches."""
    aim = Aim(f"p95 of {SHORT}-step requests beside {LONG}-step ones, of whole-request batching's, {what}", None, 0.4)
    if ours is None or other is None:
        return aim
    return dataclasses.replace(aim, value=ours.latency(SHORT, 0.95) / other.latency(SHORT, 0.95))


def aims(closed: Closed, open_: Open) -> list[Aim]:
    """What the comparison must show."""
    found = [faster(closed, APART, 1.4), faster(closed, DIFFUSERS, 4.0),
             shorter(f"{CLIENTS} clients", closed.get(OURS, {}).get(CLIENTS), closed.get(WHOLE, {}).get(CLIENTS))]
    for rate, cell in open_.get(WHOLE, {}).items():
        found.append(shorter(f"{rate:.1f} arrivals/s", open_.get(OURS, {}).get(rate), cell))
    return found


def compared(rates: Rates | None, closed: Mapping[int, Cell], open_: Mapping[float, Cell]) -> list[dict[str, Any]]:
    """Predicted and measured latencies of ours, by arrival rate.

    What HTTP adds is that of one client: its mean latency less what the engine alone needs.
    """
    if rates is None or 1 not in closed:
        return []
    alone = {s: s * rates.round[0] + rates.prepare[0] + rates.finish[0] for s in STEPS}
    other = max(sum(closed[1].mean(s) - alone[s] for s in STEPS) / len(STEPS), 0.0)
    rates, rows = dataclasses.replace(rates, other=other), []
    for rate, cell in open_.items():
        formula = predict(rates, STEPS, rate)
        rounds = replayed(rates, STEPS, rate, cell.load_seconds, cell.seeds, RAMP)
        every = [seconds for of in rounds.values() for seconds in of]
        row = {"rate": rate, "http_seconds": other, "utilisation": formula.utilisation,
               "mean": {"formula": formula.mean, "rounds": sum(every) / max(len(every), 1), "measured": cell.mean()}}
        for steps in STEPS:
            row[f"p95 of {steps} steps"] = {
                "formula": None, "rounds": percentile(rounds[steps], 0.95), "measured": cell.latency(steps, 0.95)}
            row[f"mean of {steps} steps"] = {
                "formula": formula.mean_of[steps], "rounds": sum(rounds[steps]) / max(len(rounds[steps]), 1),
                "measured": cell.mean(steps)}
        rows.append(row)
    return rows


# ---- tables ------------------------------------------------------------------------------------------------------


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None or math.isnan(seconds) else f"{1000 * seconds:.0f}"


def _cells(title: str, first: str, named: Iterable[tuple[str, str, Cell]]) -> Table:
    table = Table("server", first, "images/s", f"{SHORT} steps: p50, p95, ms", f"{LONG} steps: p50, p95, ms",
                  "memory, MB", "errors", "load, % of a core", title=title)
    for name, load, cell in named:
        short, long = ((", ".join(_milliseconds(cell.latency(s, share)) for share in (0.5, 0.95)))
                       for s in (SHORT, LONG))
        spread = f" ({min(cell.by_round):.1f}–{max(cell.by_round):.1f})"
        table.add_row(CONTESTANTS[name].title, load, f"{cell.images_per_second:.1f}{spread}", short, long,
                      f"{max(cell.memory) / 1e6:.0f}", str(sum(cell.errors.values())), f"{100 * cell.cpu_share:.0f}")
    return table


def _queueing(rows: list[dict[str, Any]]) -> Table:
    table = Table("arrivals/s", "of capacity", "latency", "formula, ms", "rounds, ms", "measured, ms",
                  "measured / rounds", title="A queueing model against the open loops of deploy serve")
    for row in rows:
        for what, values in row.items():
            if isinstance(values, dict):
                ratio = values["measured"] / values["rounds"] if values["rounds"] else math.nan
                table.add_row(f"{row['rate']:.1f}", f"{row['utilisation']:.2f}", what,
                              *(_milliseconds(values[by]) for by in ("formula", "rounds", "measured")), f"{ratio:.2f}")
    return table


def _aims(found: list[Aim]) -> Table:
    table = Table("aim", "bound", "measured", "")
    for aim in found:
        bound = f"at least {aim.least}" if aim.least is not None else f"at most {aim.most}"
        value = "not measured" if aim.met is None else f"{aim.value:.2f}"
        spread = f" ({aim.spread[0]:.2f}–{aim.spread[1]:.2f})" if aim.spread else ""
        table.add_row(aim.what, bound, value + spread, {True: "met", False: "NOT MET", None: ""}[aim.met])
    return table


def show_all(report: Mapping[str, Any], closed: Closed, open_: Open, found: list[Aim], file: Path) -> None:
    """Everything, below the machine that it is of."""
    console = Console(width=None if sys.stdout.isatty() else 150, markup=False, emoji=False)
    host = report["machine"]
    console.print(f"{host['processor']}, {host['cores']} cores, {report['threads']} threads each; load "
                  f"{report['load_before']:.1f} before, {report['load_after']:.1f} after")
    console.print(_cells("Closed loops", "clients", (
        (name, str(clients), cell) for name, cells in closed.items() for clients, cell in cells.items())))
    if open_:
        console.print(_cells("Open loops, Poisson arrivals", "arrivals/s", (
            (name, f"{rate:.1f}", cell) for name, cells in open_.items() for rate, cell in cells.items())))
    if report["queueing"]:
        console.print(_queueing(report["queueing"]))
        console.print(f"HTTP, hops and encoding, by the one client's latency: "
                      f"{1000 * report['queueing'][0]['http_seconds']:.1f} ms")
    console.print(_aims(found))
    for name, psnr in report.get("psnr_db", {}).items():
        console.print(f"{name}: first image {psnr:.1f} dB from diffusers'")
    for name, why in report["unavailable"].items():
        console.print(f"{name}: {why}")
    errors = {f"{name}: {key}": count for by in (closed, open_) for name, cells in by.items()
              for cell in cells.values() for key, count in cell.errors.items()}
    for key, count in errors.items():
        console.print(f"{count} x {key}")
    console.print(f"written to {file}")
