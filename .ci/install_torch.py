"""Install PyTorch's CPU build where that is the right one, before pip would take the default index's with CUDA.

PyPI's torch for Linux brings gigabytes of CUDA. On Linux without an NVIDIA GPU, PyTorch's own index of CPU builds is
asked; where it does not answer within seconds, or has no such release, the default index goes on. One line says which
and why. Needs Python alone: `make setup` calls it in a fresh virtual environment, from the project's root.

    PYTHONPATH=. python .ci/install_torch.py URL [pip's arguments...]
"""

from __future__ import annotations

import queue
import re
import subprocess
import sys
import textwrap
import threading
import urllib.error
import urllib.request
from importlib import metadata
from pathlib import Path

from runtimes.system.nvidia import gpu_or_none

CONSTRAINTS = Path("constraints.txt")
SECONDS = 5.0  # that the index has to answer in
PIP = (sys.executable, "-m", "pip")


def pinned(constraints: str) -> str:
    """The release of torch that constraints.txt names."""
    found = re.search(r"^torch==(\S+)", constraints, re.MULTILINE)
    if found is None:
        raise SystemExit(f"{CONSTRAINTS} names no release of torch")
    return found[1]


def own_index(arguments: list[str], configured: str) -> bool:
    """Whether the user chose where pip takes packages from: that choice holds for torch, too."""
    return any(re.match(r"(-i|--index-url|--extra-index-url|--no-index)\b", argument) for argument in arguments) or (
        re.search(r"^[\w:]+\.(index-url|no-index)=", configured, re.MULTILINE) is not None)


def why_not(url: str) -> str:
    """Empty if the index answers in time, else what is wrong with it."""
    # In a thread, since no timeout bounds the look-up of a name.
    answers: queue.Queue[str] = queue.Queue()

    def ask() -> None:
        try:
            with urllib.request.urlopen(f"{url.rstrip('/')}/torch/", timeout=SECONDS):
                answers.put("")
        except urllib.error.HTTPError as error:
            answers.put(f"{url} answers {error.code}")
        except (OSError, ValueError) as error:
            answers.put(f"{url} cannot be reached ({getattr(error, 'reason', error)})")

    threading.Thread(target=ask, daemon=True).start()
    try:
        return answers.get(timeout=SECONDS)
    except queue.Empty:
        return f"{url} does not answer within {SECONDS:g} s"


def install(url: str, arguments: list[str]) -> str:
    """Install torch alone from the index; what it needs comes with everything else. Empty, or why it failed."""
    command = [*PIP, "install", "-qq", *arguments, "--no-deps", "--timeout", "15", "--retries", "1",
               "--constraint", str(CONSTRAINTS), "--index-url", url, "torch"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return ""
    last = (done.stderr.strip().splitlines() or ["pip failed"])[-1].removeprefix("ERROR: ")
    return f"{url} has no torch for here ({textwrap.shorten(last, 160)})"


def main(url: str, arguments: list[str]) -> str:
    """Install, or leave it to the default index; the line that says which and why, or "" where there is no choice."""
    release = pinned(CONSTRAINTS.read_text(encoding="utf-8"))
    try:
        if metadata.version("torch").partition("+")[0] == release:
            return ""
    except metadata.PackageNotFoundError:
        pass
    if not sys.platform.startswith("linux") or not url:
        return ""
    if (gpu := gpu_or_none()) is not None:
        return f"torch: the default index's build, for {gpu}"
    configured = subprocess.run([*PIP, "config", "list"], capture_output=True, text=True).stdout
    if own_index(arguments, configured):
        return "torch: from the index that pip was given; no NVIDIA GPU here, the CPU build will do"
    reason = why_not(url) or install(url, arguments)
    if reason:
        return f"torch: the default index's build, which may bring gigabytes of CUDA; {reason}"
    return f"torch: PyTorch's CPU build from {url}; no NVIDIA GPU here"


if __name__ == "__main__":
    if said := main(sys.argv[1], sys.argv[2:]):
        print(said)
