"""Faults put into our code, one at a time: the fuzzer is worth what it finds of them within 300 cases.

Each is a function around one of ours. A target that is gone is an error: the fault has to be planted anew.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from typing import Any

import numpy as np

from tests.runtimes.roles import with_fact

MOST = 300  # cases within which each has to be found

Wrap = Callable[[Any], Any]


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        target: "module:attribute" or "module:Class.method".
        wrap: our function -> the faulty one.
    """

    target: str
    wrap: Wrap


def _changed_result(change: Callable[[Any], Any]) -> Wrap:
    return lambda original: lambda *args, **kwargs: change(original(*args, **kwargs))


def _changed_argument(place: int, change: Callable[[Any], Any]) -> Wrap:
    def wrap(original: Any) -> Any:
        def faulty(*args: Any, **kwargs: Any) -> Any:
            return original(*args[:place], change(args[place]), *args[place + 1 :], **kwargs)

        return faulty

    return wrap


def _third_token(ids: Any) -> Any:
    ids = ids.copy()
    ids[:, 2] = np.where(ids[:, 2] > 300, ids[:, 2] - 1, ids[:, 2] + 1)
    return ids


def _one_beta(betas: Any) -> Any:
    betas = betas.copy()
    betas[len(betas) // 2] *= 1.5
    return betas


def _config(**changes: Any) -> Wrap:
    """Keys of the scheduler's config that have another value, where the config has them."""
    def change(config: Mapping[str, Any]) -> dict[str, Any]:
        return {**config, **{key: value for key, value in changes.items() if key in config}}

    return _changed_argument(0, change)


def _pooled_is_zero(original: Any) -> Any:
    return lambda *args, **kwargs: np.zeros_like(original(*args, **kwargs))


def _last_layer(original: Any) -> Any:
    def forward(self: Any, input_ids: Any) -> Any:
        outputs, names = original(self, input_ids), self.outputs
        if "penultimate_hidden_state" not in names:
            return outputs
        result = self.model(input_ids=input_ids, output_hidden_states=True, return_dict=True)
        return tuple(result.hidden_states[-1] if name == "penultimate_hidden_state" else output
                     for name, output in zip(names, outputs, strict=True))

    return forward


def _mode_of_posterior(original: Any) -> Any:
    def encode(*args: Any, **kwargs: Any) -> Any:
        mean, deviation = original(*args, **kwargs)
        return mean, None if deviation is None else np.zeros_like(deviation)

    return encode


def _second_vector_dropped(words: Any) -> Any:
    return {word: further[1:] for word, further in words.items()}


def _negative_ignored(request: Any) -> Any:
    return replace(request, negatives=("",) * len(request.negatives))


def _without_alphas(group: Any) -> Any:
    return {name: {part: key for part, key in parts.items() if part != "alpha"} for name, parts in group.items()}


def _swapped_sizes(original: Any) -> Any:
    def numbers(self: Any, names: Any, height: int, width: int, **kwargs: Any) -> Any:
        found = original(self, names, height, width, **kwargs)
        return found[[1, 0, *range(2, len(found))]]

    return numbers


def _second_timestep(original: Any) -> Any:
    return lambda self, job, sample, timestep, *rest: original(self, job, sample, timestep + 1, *rest)


def _later_start(original: Any) -> Any:
    """One step too few with an initial image."""
    def check(self: Any, steps: Any, strength: Any, *args: Any) -> Any:
        first = original(self, steps, strength, *args)
        return first + 1 if 0 < first < steps - 1 else first

    return check


def _other_entry(codes: Any) -> Any:
    """One latent of each image gets entry 0, or 1 where it had that."""
    codes = codes.clone()
    codes[:, 1, 1] = (codes[:, 1, 1] == 0).long()
    return codes


def _longer_entries(original: Any) -> Any:
    def make(self: Any, model: Any, outputs: tuple[str, ...] = ()) -> None:
        original(self, model, outputs)
        self.codebook.weight.data *= 1.02

    return make


def _reversed_order(results: Any) -> Any:
    return [images[::-1] for images in results]


FAULTS: Mapping[str, Fault] = {
    "a token id": Fault("runtimes.text.clip_tokenizer:ClipTokenizer.__call__", _changed_result(_third_token)),
    "a beta": Fault("runtimes.schedulers.noise_levels:make_betas", _changed_result(_one_beta)),
    "the guidance formula": Fault("runtimes.pipeline.guidance:Guidance.combine",
                                  lambda original: lambda self, uncond, cond: original(
                                      replace(self, scale=self.scale + 1), uncond, cond)),
    "guidance below 1": Fault("runtimes.pipeline.guidance:Guidance.active", lambda original: lambda self, i, total: (
        self.scale > 2 and original(self, i, total))),
    # A factor would cancel: the formula divides two deviations.
    "the guidance rescaling": Fault("runtimes.pipeline.guidance:_deviation", _changed_result(np.sqrt)),
    "a LoRA's scale": Fault("runtimes.adapters.lora_files:parse_lora",
        _changed_result(lambda found: (found[0], found[1] ** 2))),
    "a LoRA's alphas": Fault("runtimes.adapters.lora_files:_by_module", _changed_result(_without_alphas)),
    "an embedding's further vectors": Fault("runtimes.text.clip_tokenizer:_words_of_several_vectors",
                                            _changed_result(_second_vector_dropped)),
    "a flipped mask": Fault("runtimes.inputs.resolved_request:to_mask", _changed_result(lambda mask: 1 - mask)),
    "the mask's threshold": Fault("runtimes.inputs.resolved_request:to_mask", _changed_argument(
        0, lambda mask: mask * 0.9 if isinstance(mask, np.ndarray) else mask.convert("L").point(lambda v: v * 0.9))),
    "the channels' order": Fault("runtimes.inputs.resolved_request:to_pixels",
        _changed_result(lambda pixels: pixels[::-1].copy())),
    "the posterior's mode": Fault("runtimes.codec.autoencoder:encode", _mode_of_posterior),
    "a timestep": Fault("runtimes.pipeline.job:Asked.__init__", _second_timestep),
    "the VAE's scaling factor": Fault("runtimes.codec.autoencoder:unscaled",
        _changed_result(lambda latents: latents * 1.02)),
    "the order of time_ids": Fault("runtimes.pipeline.conditioner:SizeConditions.numbers", _swapped_sizes),
    "the pooled embedding": Fault("runtimes.text.prompt_encoder:Embedder.pooled", _pooled_is_zero),
    "the text encoder's layer": Fault("exporters.source.named_inputs:TextEncoder.forward", _last_layer),
    "the scheduler's class": Fault("runtimes.schedulers:method_of", _changed_result(
        lambda name: {"euler-ancestral": "euler", "dpm++": "unipc", "pndm": "ddim"}.get(name, name))),
    "clip_sample": Fault("runtimes.pipeline.diffusion:from_config", _config(clip_sample=True)),
    "steps_offset": Fault("runtimes.pipeline.diffusion:from_config", _config(steps_offset=0)),
    "prediction_type": Fault("runtimes.pipeline.diffusion:from_config", _config(prediction_type="epsilon")),
    "the negative prompt": Fault("runtimes.pipeline.diffusion:resolve", _changed_result(_negative_ignored)),
    "the images' order": Fault("runtimes.pipeline.diffusion:decode_jobs", _changed_result(_reversed_order)),
    "a seed": Fault("runtimes.pipeline.diffusion:NoiseStreams",
        lambda original: lambda seeds: original([s + 1 for s in seeds])),
    "strength": Fault("runtimes.schedulers.settings:Settings.check_start", _later_start),
    "the default size": Fault("runtimes.inputs.resolved_request:_size", _changed_argument(
        0, lambda roles: roles.sized(roles.codec.height // 2, roles.codec.width // 2))),
    "zeros for no negative prompt": Fault("runtimes.pipeline.conditioner:Conditioner.__init__", _changed_argument(
        1, lambda roles: with_fact(roles, "conditioner.empty_negative",
                                   {"text": "zeros", "zeros": "text"}[roles.conditioner.empty_negative]))),
    "eta": Fault("runtimes.pipeline.diffusion:begin_part", _changed_argument(4, lambda eta: 0.0)),
    "the nearest entry of a codebook": Fault("exporters.source.named_inputs:VqDecoder.nearest",
        _changed_result(_other_entry)),
    "the size of a codebook's entries": Fault("exporters.source.named_inputs:VqDecoder.__init__", _longer_entries),
    "another variant of the weights": Fault("exporters.source.model_folder:find_weights", lambda original: (
        lambda folder, library, variant="": original(folder, library, variant or "fp16"))),
}


@contextlib.contextmanager
def planted(fault: Fault) -> Iterator[None]:
    """Our code with a fault in it."""
    module, _, path = fault.target.partition(":")
    owner: Any = importlib.import_module(module)
    *classes, name = path.split(".")
    for part in classes:
        owner = getattr(owner, part)
    original = getattr(owner, name)
    setattr(owner, name, fault.wrap(original))
    try:
        yield
    finally:
        setattr(owner, name, original)


def find(names: list[str]) -> dict[str, tuple[int, str] | None]:
    """Fault -> after how many cases it was found and by which difference; None if it was not."""
    from tests.fuzz import ours, theirs
    from tests.fuzz.cases import make
    from tests.fuzz.choices import Choices
    from tests.fuzz.models import root
    from tests.fuzz.run import prepared
    from tests.fuzz.verdict import SAME, judge

    found: dict[str, tuple[int, str] | None] = dict.fromkeys(names)
    for number in range(MOST):
        if all(found.values()):
            break
        case = make(Choices(number))
        with prepared(case) as files:
            given = case, files.folder, files.files, files.pictures
            mine, other = ours.run(*given), theirs.run(*given)
            if judge(mine, other).status != "equal":
                continue
            for name in (name for name, at in found.items() if at is None):
                with planted(FAULTS[name]):
                    faulty = judge(ours.run(*given, cache=root() / "caches" / name), other)
                if faulty.status not in SAME:
                    found[name] = number + 1, faulty.reason
                    print(f"{name}: found after {number + 1} cases: {faulty.reason}", flush=True)
    return found


def find_all(workers: int) -> int:
    """Plant each, print after how many cases it was found; 0 if all were."""
    from tests.fuzz.workers import start_worker

    names, missed = list(FAULTS), 0
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=start_worker) as pool:
        parts = pool.map(find, [names[i::workers] for i in range(workers)])
        found = {name: at for part in parts for name, at in part.items()}
    for name in (name for name in names if found[name] is None):
        missed += 1
        print(f"{name}: NOT FOUND in {MOST} cases")
    print(f"{len(names) - missed} of {len(names)} planted faults found")
    return 1 if missed else 0
