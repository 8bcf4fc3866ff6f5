"""What a comparison leaves: a file, and a table on the terminal below the machine that it is of."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from deploy.core.doctor import machine
from tests.peers.prepare import ROOT

RESULTS = ROOT / "build" / "peers"


def new_report(**settings: Any) -> dict[str, Any]:
    """A report without rows, with the machine and its load."""
    return {"machine": machine(), "load_before": os.getloadavg()[0], **settings, "rows": {}, "unavailable": {}}


def save(report: dict[str, Any], name: str) -> Path:
    """Note the load and write `build/peers/NAME.json`."""
    report["load_after"] = os.getloadavg()[0]
    RESULTS.mkdir(parents=True, exist_ok=True)
    file = RESULTS / f"{name}.json"
    file.write_text(json.dumps(report, indent=2) + "\n")
    return file


def show(report: Mapping[str, Any], table: Table, file: Path, width: int) -> None:
    """Print the table, of so many columns where the output is no terminal, and what could not be measured."""
    console = Console(width=None if sys.stdout.isatty() else width, markup=False, emoji=False)
    host = report["machine"]
    console.print(f"{host['processor']}, {host['cores']} cores; load {report['load_before']:.1f} before, "
                  f"{report['load_after']:.1f} after")
    console.print(table)
    for name, why in report["unavailable"].items():
        console.print(f"{name}: {why}", markup=False)
    console.print(f"written to {file}")
