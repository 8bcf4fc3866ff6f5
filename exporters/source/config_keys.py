"""Refuses a model's config by the key that asks for something nothing here does.

A key that the class's own `__init__` takes shapes the network, which is exported from that very class; of these the
families refuse what their pipelines would have to feed (exporters/families/parts.py). This file holds the others.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from runtimes.errors import InputError

# Keys of transformers' former base class (PretrainedConfig of release 4), which files of that time hold: they are about
# generating text, about classes and about where the file came from. None changes what a text encoder computes.
_OF_TRANSFORMERS_4 = frozenset("""
    add_cross_attention bad_words_ids begin_suppress_tokens cross_attention_hidden_size decoder_start_token_id
    diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size exponential_decay_length_penalty
    finetuning_task forced_bos_token_id forced_eos_token_id is_decoder length_penalty max_length min_length
    no_repeat_ngram_size num_beam_groups num_beams num_labels num_return_sequences output_scores prefix
    remove_invalid_values repetition_penalty return_dict_in_generate sep_token_id suppress_tokens
    task_specific_params temperature tf_legacy_loss tie_encoder_decoder tie_word_embeddings tokenizer_class top_k top_p
    torch_dtype torchscript typical_p use_bfloat16 use_cache bos_token_id eos_token_id attn_implementation
    """.split())
HARMLESS: Mapping[str, frozenset[str]] = {
    # `dropout` of CLIP's first config classes was never read by the model; projection_dim is another class's.
    "CLIPTextModel": _OF_TRANSFORMERS_4 | {"dropout", "projection_dim"},
    "CLIPTextModelWithProjection": _OF_TRANSFORMERS_4 | {"dropout"},
    "LDMBertModel": _OF_TRANSFORMERS_4 | {"hidden_size", "num_attention_heads"},
    "AutoencoderTiny": frozenset({"block_out_channels"}),  # registered by its __init__ for the pipelines
}
# Keys that no class takes and that diffusers or transformers act on.
ACTED_ON: Mapping[str, str] = {
    "use_attention_mask": "the text encoder would be fed the tokenizer's mask, which bundles do not",
    "quantization_config": "its weights are quantized; give the model as it was before",
    "transformers_weights": "it names another weight file",
}
# Of these, what the classes of a family never look at: only Stable Diffusion's read use_attention_mask.
UNREAD: Mapping[str, frozenset[str]] = {
    "stable-diffusion-xl": frozenset({"use_attention_mask"}), "ldm-text-to-image": frozenset({"use_attention_mask"}),
}
# Parts of a pipeline that its diffusers class runs only if the caller asks for it, or that `build` takes up by option.
UNASKED = ("safety_checker", "feature_extractor", "image_encoder", "watermarker", "add_watermarker")


def check_network(class_name: str, family: str, config: Mapping[str, Any], known: Collection[str],
                  file: Path) -> None:
    """Refuse a network's config that asks for something its class does not know.

    Args:
        class_name: of the network.
        family: of the pipeline.
        config: what config.json holds; a key that is null, false or empty asks for nothing, one with _ is a note.
        known: keys that the class takes.
        file: the config.json, for the error.

    Raises:
        InputError: names the key.
    """
    harmless = HARMLESS.get(class_name, frozenset()) | UNREAD.get(family, frozenset())
    for key, value in sorted(config.items()):
        if value and key in ACTED_ON and key not in harmless:
            raise InputError(f"{key}={value!r:.60}: {ACTED_ON[key]}", where=str(file), fix="use a model without it")
        if value and not key.startswith("_") and key not in known and key not in harmless:
            raise InputError(f"{key}={value!r:.60} is unknown to {class_name}", where=str(file),
                             fix="upgrade diffusers and transformers, which may know it by now, or remove it: they "
                                 "ignore what they do not know")


def check_pipeline(class_name: str, index: Mapping[str, Any], known: Collection[str], file: Path) -> None:
    """Refuse a model_index.json that asks for something its pipeline class does not know.

    Raises:
        InputError: names the entry.
    """
    for key, value in sorted(index.items()):
        asks = any(value) if isinstance(value, list) else value
        if asks and not key.startswith("_") and key not in known and key not in UNASKED:
            raise InputError(f"{key}={value!r:.60} is unknown to {class_name}", where=str(file),
                             fix="remove it, which is what diffusers does, or name the class that it belongs to")
