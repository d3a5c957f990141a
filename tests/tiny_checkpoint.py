"""A complete model directory small enough to write in a moment: weights, config, tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.numpy import save_file

from qwen2kit.spec.hf import to_hf_config
from qwen2kit.spec.model import ModelSpec
from qwen2kit.tokenizer.train_bbpe import train_bbpe
from tests.conftest import random_weights, small_spec

VOCAB = 296
_TEXTS = ["the cat sat on the mat and the dog ran", "one two three four", "what is the answer?"] * 9


def write_tiny_checkpoint(
    directory: Path, *, seed: int = 0, scale: float = 0.1, **spec_changes: object
) -> ModelSpec:
    """Write a random model in Hugging Face layout; returns its spec."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = train_bbpe(_TEXTS, VOCAB)
    changes = {"vocab_size": VOCAB + 8, "eos_token_id": tokenizer.im_end_id} | spec_changes
    spec = small_spec(**changes)
    weights = random_weights(spec, seed, scale)
    tensors = {name: weights.read(name).float32() for name in weights.names()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(to_hf_config(spec, dtype="float32")))
    generation = {"eos_token_id": [tokenizer.im_end_id, tokenizer.eot_id], "do_sample": False}
    (directory / "generation_config.json").write_text(json.dumps(generation))
    tokenizer.save(directory)
    return spec
