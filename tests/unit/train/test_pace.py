"""Speed, utilisation and time left, by figures that can be checked by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from qwen2kit.backend.processes import SingleProcess
from qwen2kit.backend.protocol import Device
from qwen2kit.config.load import load_recipe
from qwen2kit.spec.counts import train_flops_per_token
from qwen2kit.spec.presets import preset
from qwen2kit.train import pace as pace_module
from qwen2kit.train.pace import Pace, Timer
from qwen2kit.train.phases import phases
from qwen2kit.train.setup import peak_of


def test_the_first_step_says_nothing_about_speed() -> None:
    pace = Pace(flops_per_token=10.0, peak_flops=1e6)
    pace.step(1000, 5.0, 1.0)
    first = pace.figures(steps_left=3)
    assert (first["tokens_per_second"], first["mfu"]) == (0.0, None)
    assert (first["seconds"], first["data_seconds"]) == (5.0, 1.0)
    pace.step(1000, 0.1, 0.0)
    assert pace.figures(2)["tokens_per_second"] == 10_000.0


def test_means_are_over_all_steps_since_the_last_report() -> None:
    pace = Pace()
    for seconds in (0.5, 0.3, 0.2):
        pace.step(100, seconds, seconds / 10)
    figures = pace.figures(0)
    assert figures["tokens_per_second"] == 300.0
    assert figures["seconds"] == pytest.approx(1 / 3, abs=1e-6)
    assert figures["data_seconds"] == pytest.approx(0.1 / 3, abs=1e-6)


def test_utilisation_of_a_7b_on_eight_h100() -> None:
    spec = preset("qwen2-7b")
    backend: Any = SimpleNamespace(
        devices=lambda: (Device(name="cuda:0", kind="NVIDIA H100 80GB HBM3"),)
    )
    peak = peak_of(backend, load_recipe("tiny", ["dtype=bfloat16"]), world=8)
    assert peak == pytest.approx(8 * 989e12, rel=0.01)
    pace = Pace(train_flops_per_token(spec, 4096), peak)
    for _ in range(2):
        pace.step(65_536, 1.0, 0.0)
    # 6 x 7.07e9 matrix parameters (head in, embedding out) + 6 x 28 x 3584 x 4096 per token
    expected = 65_536 * (6 * 7.07e9 + 6 * 28 * 3584 * 4096) / (8 * 989e12)
    assert pace.figures(0)["mfu"] == pytest.approx(expected, rel=0.01)


def test_unknown_devices_have_no_utilisation() -> None:
    backend: Any = SimpleNamespace(devices=lambda: (Device(name="cpu", kind="a cpu"),))
    assert peak_of(backend, load_recipe("tiny"), world=2) is None


def test_the_clock_is_asked_only_if_it_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(pace_module, "perf_counter", lambda: now[0])
    votes: list[bool] = []

    class Voters(SingleProcess):
        def any(self, flag: bool) -> bool:
            votes.append(flag)
            return flag

    never, timer = Timer(0.0, Voters()), Timer(2.0, Voters())
    assert not never.due()
    assert votes == []
    now[0] = 119.0
    assert not timer.due()
    now[0] = 120.0
    assert timer.due()
    timer.reset()
    assert not timer.due()
    assert votes == [False, True, False]


def test_frozen_weights_have_no_gradients_to_count() -> None:
    spec = preset("qwen2-0.5b")
    full, adapters = (
        phases(load_recipe(name, ["seq_len=512"]), spec, 1)[0].flops_per_token
        for name in ("sft-small", "lora")
    )
    assert full == train_flops_per_token(spec, 512)
    attention = 6 * 24 * 896 * 512
    assert adapters - attention == pytest.approx(4 / 6 * (full - attention))
