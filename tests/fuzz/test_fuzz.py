"""A fixed sample of the fuzzer's cases, as many as the time allows: nothing differs from diffusers."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.fuzz import case as cases_on_disk
from tests.fuzz.cases import make
from tests.fuzz.choices import Choices
from tests.fuzz.known import named_ends, own_alphas
from tests.fuzz.planted import FAULTS, planted
from tests.fuzz.report import Report
from tests.fuzz.run import run_case
from tests.fuzz.trace import Codebook, Trace
from tests.fuzz.verdict import SAME, judge
from tests.fuzz.workers import run_number, start_worker

LEAST, SECONDS = 150, 150
MOST = 2000  # as docs/proof.md has them; no machine makes as many in the time
FLAT = 0.02  # of all cases; images without contrast prove nothing


@pytest.fixture(scope="module", autouse=True)
def _quiet():
    loggers = [logging.getLogger(name) for name in ("runtimes", "diffusers", "transformers")]
    before, levels, threads = dict(os.environ), [logger.level for logger in loggers], torch.get_num_threads()
    start_worker()
    yield
    os.environ.clear()
    os.environ.update(before)
    torch.set_num_threads(threads)
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


def test_nothing_differs_from_diffusers():
    report, began = Report(), time.monotonic()
    while report.tried < LEAST or (report.tried < MOST and time.monotonic() - began < SECONDS):
        report.add(run_number(report.tried))
    print(report.text())
    assert not report.failures, "\n".join(f"case {f.number}: {f.detail or f.reason}" for f in report.failures)
    assert report.tried >= LEAST and report.statuses["equal"] > report.tried / 3
    assert report.statuses["flat"] <= FLAT * report.tried


def test_a_written_case_is_the_same_case(tmp_path: Path):
    for number in range(40):
        case = make(Choices(number))
        case.save(tmp_path / "case.json")
        assert cases_on_disk.load(tmp_path / "case.json") == case


def test_every_value_is_met_at_least_20_times_in_2000_cases():
    report = Report()
    for number in range(2000):
        choices = Choices(number)
        make(choices)
        report.met.update(set(choices.met))
    rare = [f"{name} = {value}: {times}" for times, name, value in report.least_met() if times < 20]
    assert not rare, "\n".join(rare)


def test_a_fault_in_a_case_is_found():
    case = cases_on_disk.Case(0, request=cases_on_disk.Request(guidance=4.0))
    assert run_case(case)[0].status == "equal"
    with planted(FAULTS["a token id"]):
        verdict = run_case(case)[0]
    assert (verdict.status, verdict.reason) == ("different", "encoder_hidden_states")


def of_entries(latents: float, chosen: int, *, contrast: float = 1.0) -> Trace:
    """One side that chose entry 0 or 1 for the second of four latents; the entries are -1 and 1."""
    image = lambda codes: contrast * np.repeat(codes[..., None], 3, axis=-1).astype(np.float32)  # noqa: E731
    codes, sample = np.array([0, chosen, 1, 1]), np.array([-1, latents, 1, 1], np.float32)
    return Trace(decoded=[sample.reshape(1, 1, 2, 2)], codes=[codes], result=image(codes.reshape(1, 2, 2)),
                 codebook=Codebook(np.array([[-1], [1]], np.float32), image))


def test_an_entry_of_a_codebook_that_only_rounding_decides_is_a_near_tie_and_any_other_a_fault():
    assert judge(of_entries(1e-8, 0), of_entries(1e-8, 1)).status == "near tie"
    assert judge(of_entries(1e-4, 0), of_entries(-1e-4, 1)).status == "near tie"  # as far as latents may differ
    assert judge(of_entries(1e-4, 0), of_entries(1e-4, 1)).reason == "entries of the codebook"
    assert judge(of_entries(0.9, 0), of_entries(0.9, 1)).reason == "entries of the codebook"
    assert judge(of_entries(1e-8, 0, contrast=0.99), of_entries(1e-8, 1)).reason == "images"


def test_a_fault_in_a_codebook_is_found_where_latents_are_large_and_ties_are_many():
    scheduler = {"_class_name": "UniPCMultistepScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085,
                 "beta_end": 0.012, "use_exponential_sigmas": True}
    model = cases_on_disk.Model("ldm", edits={"scheduler/scheduler_config.json": scheduler, "model_index.json": {
        "scheduler": ["diffusers", "UniPCMultistepScheduler"]}})
    case = cases_on_disk.Case(0, model, request=cases_on_disk.Request(prompts=("",), steps=3, seeds=(2**40 + 7,)))
    assert run_case(case)[0].status in SAME
    for fault, reason in (("the nearest entry of a codebook", "entries of the codebook"),
                          ("the size of a codebook's entries", "images")):
        with planted(FAULTS[fault]):
            assert run_case(case)[0].reason == reason


def test_the_mends_of_kohya_loras_leave_a_file_of_peft_and_its_metadata_alone(tmp_path: Path):
    file = tmp_path / "peft.safetensors"
    save_file({"unet.conv_in.lora_A.weight": torch.ones(1, 2)}, file, metadata={"lora_adapter_metadata": "{}"})
    before = file.read_bytes()
    own_alphas(file)
    assert file.read_bytes() == before


def test_the_mend_of_kohyas_ends_names_text_encoders_too(tmp_path: Path):
    file = tmp_path / "kohya.safetensors"
    stems = ("lora_unet_conv_in", "lora_te2_text_model_encoder_layers_0_self_attn_q_proj")
    save_file({f"{stem}.{part}": torch.full((2, 2), 3.0) if part != "alpha" else torch.tensor(1.0) for stem in stems
               for part in ("lora_down.weight", "lora_up.weight", "alpha")}, file)
    named_ends(file)
    found = load_file(file)
    module = "text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj"
    assert set(found) == {f"{name}.lora_{part}.weight" for name in ("unet.conv_in", module) for part in "AB"}
    assert found[f"{module}.lora_B.weight"].unique().item() == 1.5  # alpha 1 of rank 2
