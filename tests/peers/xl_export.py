"""`python -m tests.peers.xl_export [MODEL]`: Stable Diffusion XL to ONNX by us, then by optimum-onnx.

Without MODEL, the published configuration with random float16 weights (7 GB; needs 45 GB of disk). Prints seconds, the
highest resident memory of any process and the bytes written, or how an export ended; one that has not ended after 25
minutes is stopped and said to be.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from runtimes.errors import UnavailableError
from tests.deploy.real_size import write_model
from tests.peers.prepare import ROOT, optimum_python

LIMIT_SECONDS = 1500
THEIRS = """import sys
from optimum.exporters.onnx import main_export
main_export(sys.argv[1], output=sys.argv[2], task="text-to-image", library_name="diffusers", do_validation=False,
            dtype="fp16")
"""


def main() -> int:
    """Export by both and print what it cost; 1 if ours fails."""
    parser = argparse.ArgumentParser(prog="python -m tests.peers.xl_export", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, metavar="MODEL", help="diffusers folder")
    given = parser.parse_args().model
    with tempfile.TemporaryDirectory(prefix="ldm-xl-") as temporary:
        folder = Path(temporary)
        model = given.resolve() if given else write_model("sdxl", folder / "sdxl", "float16")
        ours = [sys.executable, "-m", "deploy", "build", str(model), "--precision", "fp16", "--no-verify", "-o",
                str(folder / "ours")]
        done = measured("ldm-deploy, fp16", ours, folder / "ours", {"LDM_DEPLOY_CACHE": str(folder / "cache")})
        for finished in (folder / "ours", folder / "cache"):
            shutil.rmtree(finished, ignore_errors=True)
        try:
            theirs = [str(optimum_python()), "-W", "ignore", "-c", THEIRS, str(model), str(folder / "theirs")]
        except UnavailableError as error:
            print(f"optimum-onnx: {error}")
        else:
            measured("optimum-onnx, fp16", theirs, folder / "theirs", {"OMP_NUM_THREADS": str(os.cpu_count())})
    return 0 if done else 1


def measured(name: str, command: list[str], out: Path, environment: dict[str, str]) -> bool:
    """Run a command and print one line about it; whether it succeeded."""
    began = time.perf_counter()
    with tempfile.TemporaryFile("w+", encoding="utf-8") as log:
        child = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env={**os.environ, **environment})
        limit = threading.Timer(LIMIT_SECONDS, child.kill)
        limit.start()
        _, status, usage = os.wait4(child.pid, 0)
        limit.cancel()
        child.returncode = os.waitstatus_to_exitcode(status)
        log.seek(0)
        last = ([line for line in log.read().splitlines() if line.strip()] or [""])[-1]
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file()) if out.is_dir() else 0
    seconds = time.perf_counter() - began
    ended = "" if child.returncode == 0 else f"; failed with {child.returncode}: {last:.200}"
    if seconds >= LIMIT_SECONDS:
        ended = f"; stopped, it had not ended: {last:.200}"
    print(f"{name}: {seconds:.1f} s, peak {usage.ru_maxrss * 1024 / 1e9:.2f} GB, "
          f"{size / 1e9:.2f} GB written{ended}", flush=True)
    return child.returncode == 0


if __name__ == "__main__":
    sys.exit(main())
