"""MODEL may be a name on the Hugging Face Hub: only what a build reads is downloaded, and every refusal is one line."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.core.spec import BuildSpec
from deploy.model.hub import cached_name, fetch, is_name
from deploy.model.source_bundle import open_origin
from deploy.model.source_folder import model_folder
from runtimes.errors import DeployError, InputError, UnavailableError
from tests.deploy.small_hub import COMMIT, SmallHub, small_hub
from tests.exporters.family_pipelines import write_pipeline_of

NAME = "acme/tiny"
UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as repositories hold it: beside the pipeline a checkpoint, pickles, a variant and an image."""
    folder = write_pipeline_of("sd2", tmp_path_factory.mktemp("hub") / "tiny")
    for name in ("v1-5-pruned.safetensors", "unet/diffusion_pytorch_model.bin", "README.md", "assets/a.png",
                 "safety_checker/model.safetensors", "unet/flax_model.msgpack"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"not to be downloaded")
    shutil.copy(folder / UNET, folder / "unet/diffusion_pytorch_model.fp16.safetensors")
    return folder


@pytest.fixture
def hub(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SmallHub]:
    from huggingface_hub import constants

    repository = Path(shutil.copytree(model, tmp_path / "repository"))
    with small_hub(NAME, repository) as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE",
                            served.endpoint + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("LDM_DEPLOY_CACHE", str(tmp_path / "ours"))
        monkeypatch.chdir(tmp_path)
        fetch.cache_clear()
        yield served
    fetch.cache_clear()


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    fetch.cache_clear()


def test_only_what_a_build_reads_is_downloaded(hub: SmallHub) -> None:
    folder = fetch(NAME).folder
    found = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert found == {"model_index.json", "scheduler/scheduler_config.json", "text_encoder/config.json",
                     "text_encoder/model.safetensors", UNET, "unet/config.json", "vae/config.json",
                     "vae/diffusion_pytorch_model.safetensors",
                     *(f for f in found if f.startswith("tokenizer/"))}
    assert set(hub.served) == found and "tokenizer/tokenizer_config.json" in found


def test_a_variant_is_downloaded_instead_of_the_plain_weights(hub: SmallHub) -> None:
    folder = fetch(NAME, variant="fp16").folder
    assert (folder / "unet/diffusion_pytorch_model.fp16.safetensors").is_file() and not (folder / UNET).exists()
    assert (folder / "vae/diffusion_pytorch_model.safetensors").is_file(), "it has no such variant"


def test_a_bundle_names_the_model_and_its_commit(hub: SmallHub) -> None:
    manifest = open_origin(BuildSpec(model=NAME, variant="fp16")).manifest
    assert (manifest.source.id, manifest.source.revision) == (NAME, COMMIT)
    assert manifest.components["unet"].file == "unet/diffusion_pytorch_model.fp16.safetensors"


def test_the_cache_is_used_offline(hub: SmallHub, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = fetch(NAME).folder
    hub.served.clear()
    offline(monkeypatch)
    assert fetch(NAME).folder == folder and not hub.served
    with pytest.raises(UnavailableError, match="not wholly in the Hub's cache"):
        fetch(NAME, variant="fp16")


def test_offline_without_the_model_says_what_to_do(hub: SmallHub, monkeypatch: pytest.MonkeyPatch) -> None:
    offline(monkeypatch)
    with pytest.raises(UnavailableError, match="no folder, not or not wholly in the Hub's cache") as caught:
        model_folder(NAME)
    assert caught.value.exit_code == 4 and f"hf download {NAME}" in caught.value.fix


def test_without_any_network_it_is_exit_4(hub: SmallHub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UnavailableError, match="the Hub cannot be reached"):
        fetch(NAME)


@pytest.mark.parametrize(("status", "code", "kind", "words"), [
    (404, "RepoNotFound", InputError, "neither a folder nor a model on the Hub"),
    (401, "", InputError, "the Hub refuses access"),
    (403, "GatedRepo", InputError, "access to this model is restricted"),
    (404, "RevisionNotFound", InputError, "no revision"),
    (500, "", UnavailableError, "the Hub answers 500|cannot be reached"),
])
def test_what_the_hub_refuses_is_one_line(
    status: int, code: str, kind: type[DeployError], words: str, hub: SmallHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.refused = status, code
    with pytest.raises(kind, match=words) as caught:
        fetch(NAME)
    assert "\n" not in str(caught.value) and caught.value.where == NAME


def test_an_unknown_revision_is_refused(hub: SmallHub) -> None:
    with pytest.raises(InputError, match="no revision 'v9'"):
        fetch(NAME, "v9")
    assert fetch(NAME, COMMIT).commit == COMMIT


def test_a_download_that_breaks_off_leaves_nothing_half_used(hub: SmallHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.breaks_at = "vae/diffusion_pytorch_model.safetensors"
    with pytest.raises(UnavailableError, match=r"download failed|cannot be reached") as caught:
        fetch(NAME)
    assert "\n" not in str(caught.value)
    offline(monkeypatch)
    with pytest.raises(UnavailableError, match="not wholly"):
        fetch(NAME)
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.breaks_at = ""
    assert (fetch(NAME).folder / "vae/diffusion_pytorch_model.safetensors").is_file()


@pytest.mark.parametrize(("change", "words"), [
    ({UNET: None}, "no plain weights, but the variant fp16"),
    ({UNET: None, "unet/diffusion_pytorch_model.fp16.safetensors": None}, "the weights are a pickle"),
    ({"model_index.json": None}, "it holds no model_index.json"),
])
def test_a_repository_without_usable_weights_is_refused_before_any_is_downloaded(
    change: dict[str, None], words: str, hub: SmallHub
) -> None:
    for name in change:
        (hub.folder / name).unlink()
    with pytest.raises(InputError, match=words):
        fetch(NAME)
    assert not [file for file in hub.served if file.endswith(".safetensors")]


@pytest.mark.parametrize("argument", ["no/such/folder", "../acme/tiny", "/acme/tiny", "tiny", "acme/ti ny"])
def test_what_is_no_name_is_a_folder(argument: str, hub: SmallHub) -> None:
    assert not is_name(argument) and model_folder(argument) == Path(argument)


def test_a_folder_of_that_path_wins(hub: SmallHub, tmp_path: Path) -> None:
    (tmp_path / NAME).mkdir(parents=True)
    assert model_folder(NAME) == Path(NAME) and not hub.served
    with pytest.raises(InputError, match="a revision is of a model on the Hub"):
        model_folder(NAME, "main")


def test_a_folder_in_the_hubs_cache_has_its_name() -> None:
    assert cached_name(Path(f"/hub/models--acme--tiny--2/snapshots/{COMMIT}")) == ("acme/tiny--2", COMMIT)
    assert cached_name(Path("/models/tiny")) == ("", "")
