"""Prints what `bench` measured, as tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Column, Table

from deploy.cli.console import megabytes, out


def show_bench(report: Mapping[str, Any]) -> None:
    """Runs side by side, where their time goes, the batch sweep, and how far the U-Net is from the machine's limits."""
    host, settings, limits = report["machine"], report["settings"], report["limits"]
    out.print(f"{host['processor']}, {host['cores']} cores, {settings['threads']} threads each, load "
              f"{report['load_before']:.1f} before, {report['load_after']:.1f} after; the most it "
              f"does: {limits['gemm_gflops']:.0f} GFLOP/s in a product, copying "
              f"{limits['copy_gigabytes_per_second']:.1f} GB/s")
    batch = report["batches"][0]["batch"]
    table = Table(title=f"{batch} image{'s' if batch > 1 else ''} at once, {settings['steps']} steps: medians of "
                        f"{settings['rounds']} interleaved rounds (min–max)")
    for title in ("", "seconds", "× the first", "cold start", "peak RSS", "PSNR"):
        table.add_column(title, justify="left" if not title else "right", overflow="fold")
    for run in report["runs"]:
        ratio = report["ratios"].get(run["name"])
        table.add_row(run["name"], shown(run["seconds"], 3), shown(ratio, 2) if ratio else "1",
                      f"{run['cold_start_seconds']:.2f} s", megabytes(run["peak_rss_bytes"]),
                      f"{run['psnr_db']:.1f} dB")
    out.print(table)
    parts = sorted({part for run in report["runs"] for part in run["components"]})
    table = Table(Column(overflow="fold"), *parts, title="Where the time goes: ms of an image, share")
    for run in report["runs"]:
        found = run["components"]
        table.add_row(run["name"], *(f"{found[p]['seconds'] * 1e3:.1f} ({found[p]['share']:.1%})" if p in found else ""
                                     for p in parts))
    out.print(table)
    if len(report["batches"]) > 1:
        table = Table("images at once", *(run["name"] for run in report["runs"]), title="ms per image")
        for entry in report["batches"]:
            table.add_row(str(entry["batch"]), *(f"{s * 1e3:.1f}" for s in entry["seconds_per_image"].values()))
        out.print(table)
    for run in report["runs"]:
        if (found := run.get("limits")) is not None:
            gflops = (f"{found['unet_gflops']:.0f} GFLOP/s, {found['share_of_gemm_peak']:.0%} of the product's peak; "
                      if "unet_gflops" in found else "")
            rate = found["weight_gigabytes_per_second"]
            out.print(f"  {run['name']}, U-Net: {gflops}its weights pass at {rate:.1f} GB/s, "
                      f"{rate / limits['copy_gigabytes_per_second']:.0%} of what copying does")


def shown(spread: Mapping[str, float], digits: int) -> str:
    """`median (min–max)`."""
    return f"{spread['median']:.{digits}f} ({spread['min']:.{digits}f}–{spread['max']:.{digits}f})"
