"""Downloads a model from the Hugging Face Hub into the Hub's cache: safetensors, configs, tokenizers, no pickle."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from exporters.source.model_folder import MODEL_INDEX
from runtimes.bundle.folder import translated_disk_errors
from runtimes.codec.safety_checker import PREPROCESSOR_FILE, SAFETY_CHECKER
from runtimes.errors import DeployError, InputError, UnavailableError
from runtimes.system.progress import listener

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_TEXTS = (".json", ".txt", ".model")
_WEIGHTS = re.compile(r"(?:model|diffusion_pytorch_model)(?:\.(?P<variant>[^.]+?))?(?:-\d+-of-\d+)?"
                      r"(?:\.(?P<old>[^.]+))?\.safetensors")
_INDEX = re.compile(r"(?:model|diffusion_pytorch_model)\.safetensors(?:\.(?P<old>[^.]+))?\.index"
                    r"(?:\.(?P<variant>[^.]+))?\.json")
_LEFT_OUT = ("feature_extractor", "image_encoder")


@dataclass(frozen=True)
class Snapshot:
    """A model as it lies in the Hub's cache.

    Attributes:
        folder: REPOSITORY/snapshots/COMMIT, with links to the files.
        commit: of the repository.
    """

    folder: Path
    commit: str


def is_name(model: str) -> bool:
    """Whether a model argument may be a name on the Hub: OWNER/NAME, and no folder of that path."""
    return _NAME.fullmatch(model) is not None and ".." not in model and not Path(model).exists()


def cached_name(folder: Path) -> tuple[str, str]:
    """OWNER/NAME and commit of a folder in the Hub's cache; empty texts for any other folder."""
    if len(folder.parts) < 3 or folder.parts[-2] != "snapshots" or not folder.parts[-3].startswith("models--"):
        return "", ""
    return folder.parts[-3].removeprefix("models--").replace("--", "/", 1), folder.name


@cache
def fetch(model: str, revision: str = "", variant: str = "", safety_checker: bool = False) -> Snapshot:
    """Download what a build reads of a model, or find it in the Hub's cache; `HF_HUB_OFFLINE=1` looks there only.

    Args:
        model: OWNER/NAME.
        revision: a branch, a tag or a commit; the main branch by default.
        variant: of the weight files; a component without files of it has its plain ones.
        safety_checker: whether the build takes it up.

    Raises:
        InputError: no such model or revision, access is denied, or it has no safetensors weights.
        UnavailableError: the Hub cannot be reached and the cache lacks the model, or the disk is full.
    """
    from huggingface_hub import snapshot_download

    with _explained(model, revision):
        first = Path(snapshot_download(model, revision=revision or None, allow_patterns=[MODEL_INDEX]))
        if not (first / MODEL_INDEX).is_file():
            raise InputError(f"it holds no {MODEL_INDEX}", where=model,
                             fix="give a model in diffusers layout; `convert` takes a single file that you downloaded")
        wanted = wanted_files(_listed(model, first), json.loads((first / MODEL_INDEX).read_text(encoding="utf-8")),
                              variant, safety_checker, model)
        missing = [name for name in wanted if not (first / name).is_file()]
        if missing:
            listener().finished(f"{model}: {len(missing)} files from the Hub")
        folder = Path(snapshot_download(model, revision=first.name, allow_patterns=sorted(wanted)))
    return Snapshot(folder, folder.name)


def wanted_files(files: Iterable[str], index: Mapping[str, Any], variant: str, safety_checker: bool,
                 where: str) -> set[str]:
    """What a build reads: texts of every part, and of the networks the weights that diffusers would load.

    Args:
        files: all that the repository holds.
        index: its model_index.json.
        variant, safety_checker: as of `fetch`.
        where: for errors.

    Raises:
        InputError: a network without safetensors weights, or none of that variant.
    """
    parts = {name: entry for name, entry in index.items()
             if isinstance(entry, list) and any(entry) and name not in _LEFT_OUT}
    if not safety_checker:
        parts.pop(SAFETY_CHECKER, None)
    found = {name: [file.removeprefix(f"{name}/") for file in files if file.startswith(f"{name}/")] for name in parts}
    wanted = {MODEL_INDEX, *([PREPROCESSOR_FILE] if safety_checker else [])}
    for name, inside in found.items():
        wanted |= {f"{name}/{file}" for file in inside
                   if file.endswith(_TEXTS) and "/" not in file and not _INDEX.fullmatch(file)}
        if parts[name][1] and "config.json" in inside and not name.startswith(("tokenizer", "scheduler")):
            wanted |= {f"{name}/{file}" for file in _weights(inside, variant, f"{where}/{name}")}
    return wanted


def _weights(files: list[str], variant: str, where: str) -> list[str]:
    """Weight files and indices of one variant, or the plain ones of a network that has none of it."""
    kinds: dict[str, list[str]] = {}
    for file in files:
        if match := _WEIGHTS.fullmatch(file) or _INDEX.fullmatch(file):
            kinds.setdefault(match["variant"] or match["old"] or "", []).append(file)
    if found := kinds.get(variant) or kinds.get(""):
        return found
    if kinds:
        raise InputError(f"no plain weights, but the variant {' and '.join(sorted(kinds))}", where=where,
                         fix=f"choose it with --variant {min(kinds)}")
    pickles = [file for file in files if file.endswith((".bin", ".pt", ".ckpt"))]
    raise InputError(f"the weights are a pickle ({pickles[0]}), which can run code when it is read: refused" if pickles
                     else "no weights: no .safetensors file", where=where, fix="give a model with safetensors weights")


def _listed(model: str, snapshot: Path) -> list[str]:
    """What the repository holds at that commit; where the Hub's client did not note it, what the cache holds."""
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    try:
        return [file.path for file in get_cached_repo_tree(model, revision=snapshot.name)]
    except CachedRepoTreeNotFoundError:
        return [file.relative_to(snapshot).as_posix() for file in snapshot.rglob("*") if file.is_file()]


@contextmanager
def _explained(model: str, revision: str) -> Iterator[None]:
    """The Hub's errors as ours, most specific first."""
    from huggingface_hub import errors
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # of the client below, httpx by name

    offline = f"connect, or download it elsewhere with `hf download {model}`; HF_HUB_OFFLINE=1 uses the cache alone"
    try:
        with translated_disk_errors(Path("the Hub's cache")):
            yield
    except DeployError:
        raise
    except errors.HFValidationError as error:
        raise InputError("neither a folder nor a name on the Hub", where=model,
                         fix="give a folder or OWNER/NAME") from error
    except errors.GatedRepoError as error:
        raise InputError("access to this model is restricted", where=model,
                         fix=f"ask for it at https://huggingface.co/{model} and log in with `hf auth login`") from error
    except errors.RevisionNotFoundError as error:
        raise InputError(f"it has no revision {revision!r}", where=model,
                         fix="give a branch, a tag or a commit") from error
    except errors.RepositoryNotFoundError as error:
        raise InputError("neither a folder nor a model on the Hub, or one that is private", where=model,
                         fix="check the name; for a private model log in with `hf auth login`") from error
    except errors.LocalEntryNotFoundError as error:
        raise UnavailableError("no folder, not or not wholly in the Hub's cache, and the Hub cannot be reached",
                               where=model, fix=offline) from error
    except errors.HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise InputError("the Hub refuses access to it", where=model,
                             fix="log in with `hf auth login`, as somebody who may read it") from error
        raise UnavailableError(f"the Hub answers {error.response.status_code}", where=model,
                               fix="try again later") from error
    except (HTTPError, OSError) as error:  # a download that broke off
        raise UnavailableError(f"the download failed: {str(error).partition(chr(10))[0]:.200}", where=model,
                               fix="run again: what is there already is not downloaded twice") from error
