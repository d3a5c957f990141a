"""What is not plain LoRA of this model is refused in one line that names it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qwen2kit.adapters.directory import open_adapter, write_adapter
from qwen2kit.errors import ConfigError, Qwen2KitError, WeightError
from tests.conftest import small_spec
from tests.tiny_adapter import random_adapter

CONFIG, PEFT, MLX = "adapter_config.json", "adapter_model.safetensors", "adapters.safetensors"
Q0 = "base_model.model.model.layers.0.self_attn.q_proj."


def written(directory: Path, to: Any = "hf") -> Path:
    write_adapter(random_adapter(small_spec(), targets=("q_proj",)), directory, to=to, force=False)
    return directory


def change(path: Path, **changes: object) -> None:
    document = json.loads(path.read_text())
    path.write_text(json.dumps(document | changes))


def one_line(error: pytest.ExceptionInfo[Qwen2KitError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("peft_type", "LOHA", "only LoRA"),
        ("task_type", "SEQ_CLS", "only causal language models"),
        ("use_dora", True, "DoRA is not supported"),
        ("bias", "lora_only", "trained biases"),
        ("lora_bias", True, "adapters with biases"),
        ("modules_to_save", ["lm_head"], "fully trained modules"),
        ("fan_in_fan_out", True, "transposed"),
        ("init_lora_weights", "pissa", "changes the base weights"),
        ("trainable_token_indices", [1], "trainable_token_indices is set"),
        ("layer_replication", [[0, 2]], "layer_replication is set"),
        ("a_key_of_tomorrow", {"x": 1}, "a_key_of_tomorrow is set"),
        ("r", 0, "r must be a positive integer"),
        ("r", True, "r must be a positive integer"),
        ("lora_alpha", "big", "lora_alpha must be a number"),
        ("lora_alpha", float("nan"), "lora_alpha must be a number"),
        ("target_modules", [], "target_modules must name modules"),
        ("target_modules", "(", "bad pattern"),
        ("rank_pattern", {"(": 4}, "bad pattern"),
        ("rank_pattern", [], None),
        ("rank_pattern", {"q_proj": -1}, "rank_pattern.q_proj must be a positive"),
        ("alpha_pattern", {"q_proj": None}, "alpha_pattern.q_proj must be a number"),
        ("a_key_of_tomorrow", None, None),
        ("task_type", None, None),
        ("megatron_core", "megatron.core", None),
    ],
)
def test_settings_of_peft(key: str, value: object, says: str | None, tmp_path: Path) -> None:
    directory = written(tmp_path / "a")
    change(directory / CONFIG, **{key: value})
    if says is None:
        assert len(open_adapter(directory).modules) == 3
        return
    with pytest.raises(ConfigError, match=says) as error:
        open_adapter(directory)
    assert key in one_line(error)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"r": 5}, "has rank 4, adapter_config.json says 5"),
        ({"target_modules": ["v_proj"]}, "is no target module"),
        (
            {"target_modules": ["q_proj", "up_proj"]},
            "holds nothing for the target module 'up_proj'",
        ),
    ],
)
def test_config_and_tensors_must_agree(
    settings: dict[str, object], says: str, tmp_path: Path
) -> None:
    directory = written(tmp_path / "a")
    change(directory / CONFIG, **settings)
    with pytest.raises(WeightError, match=says) as error:
        open_adapter(directory)
    assert PEFT in one_line(error)


def _drop_b(tensors: dict[str, Any]) -> None:
    del tensors[Q0 + "lora_B.weight"]


def _foreign(tensors: dict[str, Any]) -> None:
    tensors["base_model.model.lm_head.weight"] = np.zeros((4, 4), np.float32)


def _embedding(tensors: dict[str, Any]) -> None:
    tensors["base_model.model.model.embed_tokens.lora_embedding_A"] = np.zeros((4, 4), np.float32)


def _magnitude(tensors: dict[str, Any]) -> None:
    tensors[Q0 + "lora_magnitude_vector.weight"] = np.zeros(4, np.float32)


def _ranks(tensors: dict[str, Any]) -> None:
    tensors[Q0 + "lora_B.weight"] = np.zeros((64, 5), np.float32)


def _integers(tensors: dict[str, Any]) -> None:
    tensors[Q0 + "lora_A.weight"] = np.zeros((4, 64), np.int32)


def _nothing(tensors: dict[str, Any]) -> None:
    tensors.clear()
    tensors[""] = np.zeros(1, np.float32)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (_drop_b, "has no lora_B; the file is incomplete"),
        (_foreign, "lm_head.weight' is not a low-rank update"),
        (_embedding, "lora_embedding_A' is not a low-rank update"),
        (_magnitude, "lora_magnitude_vector.weight' is not a low-rank update"),
        (_ranks, "do not belong together"),
        (_integers, "do not belong together"),
        (_nothing, "is not a low-rank update"),
    ],
)
def test_tensors_of_peft(spoil: Any, says: str, tmp_path: Path) -> None:
    directory = written(tmp_path / "a")
    tensors = dict(load_file(directory / PEFT))
    spoil(tensors)
    save_file(tensors, directory / PEFT)
    with pytest.raises(WeightError, match=says) as error:
        open_adapter(directory)
    assert PEFT in one_line(error)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(WeightError, match="this is not an adapter"):
        open_adapter(tmp_path)
    directory = written(tmp_path / "a")
    (directory / PEFT).rename(directory / "adapter_model.bin")
    with pytest.raises(WeightError, match="a pickle, which is not read"):
        open_adapter(directory)
    (directory / "adapter_model.bin").unlink()
    with pytest.raises(WeightError, match="absent; save the adapter as safetensors"):
        open_adapter(directory)
    (directory / CONFIG).write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        open_adapter(directory)
    (directory / CONFIG).write_text("{}")
    with pytest.raises(ConfigError, match="no peft_type; this is not a PEFT adapter"):
        open_adapter(directory)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"fine_tune_type": "dora"}, "fine_tune_type is 'dora': only lora"),
        ({"fine_tune_type": "full"}, "only lora"),
        ({"lora_parameters": None}, "has no lora_parameters"),
        ({"lora_parameters": {"rank": 4}}, "lora_parameters.scale must be a number"),
    ],
)
def test_settings_of_mlx_lm(settings: dict[str, object], says: str, tmp_path: Path) -> None:
    directory = written(tmp_path / "a", "mlx")
    change(directory / CONFIG, **settings)
    with pytest.raises(ConfigError, match=says) as error:
        open_adapter(directory)
    one_line(error)


def test_tensors_of_mlx_lm(tmp_path: Path) -> None:
    directory = written(tmp_path / "a", "mlx")
    tensors = dict(load_file(directory / MLX))
    path = "model.layers.0.self_attn.q_proj"
    save_file(tensors | {f"{path}.m": np.zeros(4, np.float32)}, directory / MLX)
    with pytest.raises(WeightError, match="is not a low-rank update"):
        open_adapter(directory)
    kept = {name: value for name, value in tensors.items() if name != f"{path}.lora_b"}
    save_file(kept, directory / MLX)
    with pytest.raises(WeightError, match="has no lora_b; the file is incomplete"):
        open_adapter(directory)
    save_file(tensors | {f"{path}.lora_a": np.zeros((2, 64, 4), np.float32)}, directory / MLX)
    with pytest.raises(WeightError, match="is not a low-rank update"):
        open_adapter(directory)


def test_another_model(tmp_path: Path) -> None:
    adapter = random_adapter(small_spec(), base_model="org/small")
    with pytest.raises(WeightError, match=r"another model: .*gate_proj.*\[160, 64\]") as error:
        adapter.check_fits(small_spec(intermediate_size=192))
    assert "it was made for org/small" in one_line(error)
    with pytest.raises(WeightError, match="which the model lacks") as error:
        adapter.check_fits(small_spec(num_hidden_layers=2))
    assert "layers.2" in one_line(error)
    adapter.check_fits(small_spec(tied=False))


def test_mlx_lm_has_one_rank_and_scale(tmp_path: Path) -> None:
    spec = small_spec()
    adapter = random_adapter(spec, rank=4)
    mixed = dict(adapter.modules) | dict(random_adapter(spec, rank=2, targets=("v_proj",)).modules)
    from dataclasses import replace

    with pytest.raises(ConfigError, match="different rank or scale") as error:
        write_adapter(replace(adapter, modules=mixed), tmp_path / "out", to="mlx", force=False)
    assert "--adapter" in one_line(error)
    assert list(tmp_path.iterdir()) == []
