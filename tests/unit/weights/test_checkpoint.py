"""Opening directories: what is read, what is refused, and the generation defaults."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen2kit.errors import ConfigError, Qwen2KitError, WeightError
from qwen2kit.weights.checkpoint import open_checkpoint
from qwen2kit.weights.safetensors_read import SafetensorsFile
from qwen2kit.weights.safetensors_write import write_safetensors
from qwen2kit.weights.tensor import from_numpy
from tests.tiny_checkpoint import write_tiny_checkpoint


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write_tiny_checkpoint(tmp_path / "model")
    return tmp_path / "model"


def _edit(path: Path, **changes: Any) -> None:
    document = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in document.items() if v is not ...}))


def test_a_directory_opens_without_loading(model: Path) -> None:
    checkpoint = open_checkpoint(model)
    assert (checkpoint.format, checkpoint.dtype, checkpoint.quantization) == ("hf", "float32", None)
    assert checkpoint.path == model
    assert checkpoint.tokenizer().decode(checkpoint.tokenizer().encode("the cat")) == "the cat"


def test_transformers_sharded_output_opens(model: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(model)
    loaded.save_pretrained(tmp_path / "saved", max_shard_size="100KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model / name, tmp_path / "saved" / name)
    assert len(list((tmp_path / "saved").glob("model-*.safetensors"))) > 1
    a, b = open_checkpoint(model), open_checkpoint(tmp_path / "saved")
    assert a.spec == b.spec
    for name in a.weights.names():
        assert np.array_equal(a.weights.read(name).raw(), b.weights.read(name).raw())


@pytest.mark.parametrize("method", ["bitsandbytes", "fp8", "compressed-tensors"])
def test_foreign_quantisation_is_refused_by_name(model: Path, method: str) -> None:
    _edit(model / "config.json", quantization_config={"quant_method": method, "bits": 4})
    with pytest.raises(WeightError, match=f"'{method}'.*unquantised checkpoint"):
        open_checkpoint(model)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pytorch_model.bin", "pickle"),
        ("pytorch_model-00001-of-00002.bin", "pickle"),
        ("consolidated.00.pth", "pickle"),
        ("adapter_model.safetensors", "LoRA adapter"),
        ("notes.txt", "is the download complete"),
    ],
)
def test_missing_weights_say_what_is_there_instead(model: Path, name: str, message: str) -> None:
    (model / "model.safetensors").rename(model / name)
    with pytest.raises(WeightError, match=message):
        open_checkpoint(model)


def _break_config(model: Path) -> None:
    (model / "config.json").write_text('{"model_type": "qwen2",')


def _list_config(model: Path) -> None:
    (model / "config.json").write_text("[1]")


def _llama(model: Path) -> None:
    _edit(model / "config.json", model_type="llama")


def _wrong_width(model: Path) -> None:
    _edit(model / "config.json", intermediate_size=161)


def _truncate(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def _integers(model: Path) -> None:
    file = SafetensorsFile(model / "model.safetensors")
    tensors = [(n, from_numpy(file.read(n).float32().astype(np.int32))) for n in file.names()]
    write_safetensors(model / "model.safetensors", tensors)


def _bad_generation(model: Path) -> None:
    _edit(model / "generation_config.json", do_sample=True, temperature=-1)


def _bad_eos(model: Path) -> None:
    _edit(model / "generation_config.json", eos_token_id="</s>")


BROKEN = {
    _break_config: "not valid JSON",
    _list_config: "must hold a JSON object",
    _llama: "not of the Qwen2 family",
    _wrong_width: "wrong shape",
    _truncate: "truncated",
    _integers: "weights are int32",
    _bad_generation: "temperature has the invalid value -1",
    _bad_eos: "eos_token_id must be an integer",
}


@pytest.mark.parametrize("damage", BROKEN, ids=lambda damage: damage.__name__.strip("_"))
def test_damage_is_one_line_that_names_the_place(model: Path, damage: Any) -> None:
    damage(model)
    with pytest.raises(Qwen2KitError, match=BROKEN[damage]) as caught:
        open_checkpoint(model)
    assert str(model) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_neither_directory_nor_gguf(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(b"x")
    with pytest.raises(WeightError, match="neither a model directory"):
        open_checkpoint(tmp_path / "x.bin")
    with pytest.raises(WeightError, match=r"no config.json"):
        open_checkpoint(tmp_path)


def test_sampling_defaults_are_those_of_the_authors(model: Path) -> None:
    qwen = {
        "do_sample": True,
        "temperature": 0.7,
        "top_p": 0.8,
        "top_k": 20,
        "repetition_penalty": 1.05,
    }
    _edit(model / "generation_config.json", **qwen)
    generation = open_checkpoint(model).generation
    for key in ("temperature", "top_p", "top_k", "repetition_penalty"):
        assert getattr(generation, key) == qwen[key]
    _edit(model / "generation_config.json", do_sample=False)
    assert open_checkpoint(model).generation.temperature == 0
    assert open_checkpoint(model).generation.repetition_penalty == 1.05


def test_sampling_without_numbers_means_transformers_defaults(model: Path) -> None:
    transformers = pytest.importorskip("transformers")
    _edit(model / "generation_config.json", do_sample=True)
    generation = open_checkpoint(model).generation
    assert generation.temperature == 1.0
    assert generation.top_p == 1.0
    assert generation.top_k == 50
    legacy = transformers.GenerationConfig(do_sample=True).top_k
    assert legacy in (None, 50)


def test_without_generation_config_decoding_is_greedy_and_still_stops(model: Path) -> None:
    (model / "generation_config.json").unlink()
    generation = open_checkpoint(model).generation
    tokenizer = open_checkpoint(model).tokenizer()
    assert generation.temperature == 0
    assert set(generation.stop_token_ids) == {tokenizer.im_end_id, tokenizer.eot_id}


def test_a_config_that_names_one_end_token_still_stops_on_both(model: Path) -> None:
    tokenizer = open_checkpoint(model).tokenizer()
    _edit(model / "generation_config.json", eos_token_id=tokenizer.eot_id)
    _edit(model / "config.json", eos_token_id=None)
    assert open_checkpoint(model).generation.stop_token_ids == (
        tokenizer.eot_id,
        tokenizer.im_end_id,
    )


def test_ids_outside_the_vocabulary_are_dropped(model: Path) -> None:
    _edit(model / "generation_config.json", eos_token_id=[151645, 3, 3])
    assert 3 in open_checkpoint(model).generation.stop_token_ids
    assert 151645 not in open_checkpoint(model).generation.stop_token_ids


def test_unsupported_sampling_settings_are_reported(model: Path) -> None:
    _edit(model / "generation_config.json", do_sample=True, min_p=0.1, num_beams=1, typical_p=1.0)
    assert open_checkpoint(model).generation.ignored == ("min_p",)


def test_a_range_error_names_the_file(model: Path) -> None:
    _edit(model / "generation_config.json", do_sample=True, top_p=1.5)
    with pytest.raises(ConfigError, match=r"generation_config.json: top_p .* 1.5"):
        open_checkpoint(model)
