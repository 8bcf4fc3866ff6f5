"""LoRAs beside PEFT itself, in an environment of its own: everything else is tested where PEFT is not installed."""

from __future__ import annotations

import re
import subprocess
import sysconfig
import venv
from pathlib import Path

import pytest

PEFT = "peft==0.21.2"


@pytest.mark.slow
def test_merged_and_swapped_loras_draw_what_peft_draws(root: Path, tmp_path: Path) -> None:
    """Runs what `test_adapters.py` and `test_lora_swap.py` skip without PEFT, and prints the errors."""
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    packages = next((tmp_path / "venv" / "lib").glob("python*/site-packages"))
    (packages / "ours.pth").write_text(sysconfig.get_path("purelib") + "\n")
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", PEFT], check=True)
    result = subprocess.run(
        [python, "-m", "pytest", "-q", "-s", "-rs", "-p", "no:xdist", "-k", "peft", "tests/deploy/test_adapters.py",
         "tests/deploy/test_lora_swap.py"], cwd=root, capture_output=True, text=True)
    print(*re.findall("^.*latents differ by.*$", result.stdout, re.MULTILINE), sep="\n")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "3 passed" in result.stdout and "skipped" not in result.stdout
