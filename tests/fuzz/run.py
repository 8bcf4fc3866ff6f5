"""One case from its data to a verdict."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tests.fuzz import adapters, known, ours, theirs, verdict, weight_files
from tests.fuzz.case import Case
from tests.fuzz.models import root
from tests.fuzz.requests import make_picture
from tests.fuzz.trace import Stopped, Trace
from tests.fuzz.verdict import SAME, Verdict


@dataclass(frozen=True)
class Prepared:
    """A case's files on disk."""

    folder: Path
    files: dict[str, Path]
    pictures: dict[str, Any]


@contextlib.contextmanager
def prepared(case: Case) -> Iterator[Prepared]:
    """Write the folder, the adapters and the images of a case; removed afterwards."""
    scratch = Path(tempfile.mkdtemp(dir=root(), prefix="case-"))
    try:
        folder = weight_files.write(case.model, scratch / "model")
        files: dict[str, Path] = {}
        for number, lora in enumerate(case.loras):
            files[f"lora{number}"] = scratch / f"lora{number}.safetensors"
            adapters.write_lora(lora, case.model, files[f"lora{number}"], number)
        for number, embedding in enumerate(case.embeddings):
            files[f"embedding{number}"] = scratch / f"embedding{number}.safetensors"
            adapters.write_embedding(embedding, files[f"embedding{number}"], number)
        wanted = {"image": case.request.image, "mask": case.request.mask}
        pictures = {name: make_picture(picture, scratch, name, case.number)
                    for name, picture in wanted.items() if picture is not None}
        yield Prepared(folder, files, pictures)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _mended(files: dict[str, Path], mends: Sequence[Callable[[Path], None]]) -> dict[str, Path]:
    """The adapters, their LoRAs copied and mended."""
    found = dict(files)
    for name, file in files.items():
        if mends and name.startswith("lora"):
            found[name] = Path(shutil.copy(file, file.with_name(f"mended-{file.name}")))
            for mend in mends:
                mend(found[name])
    return found


def quiet_libraries() -> None:
    """One thread, no network, no chatter: a case is small, and its prints would hide the report."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
                   "LDM_DEPLOY_CACHE": str(root() / "cache")}
    import logging

    import diffusers
    import torch
    import transformers

    torch.set_num_threads(1)
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity(logging.CRITICAL)
        library.utils.logging.disable_progress_bar()
    logging.getLogger("runtimes").setLevel(logging.ERROR)


def run_case(case: Case) -> tuple[Verdict, Trace | Stopped, Trace | Stopped]:
    """Both sides of a case and their verdict; ours first comes to nothing that theirs could see."""
    with prepared(case) as files:
        mine = ours.run(case, files.folder, files.files, files.pictures)
        other = theirs.run(case, files.folder, files.files, files.pictures)
        found = verdict.judge(mine, other)
        faults = [fault for fault in known.KNOWN if fault.concerns(case)] if found.status == "different" else []
        for tried in [*([fault] for fault in faults), *([faults] if len(faults) > 1 else [])]:
            adapted = _mended(files.files, [fault.mend_lora for fault in tried if fault.mend_lora is not None])
            mended = theirs.run(case, files.folder, adapted, files.pictures, [fault.mend for fault in tried])
            if verdict.judge(mine, mended).status in SAME:
                names = " and ".join(fault.name for fault in tried)
                return replace(found, status="known fault", reason=names), mine, other
    return found, mine, other
