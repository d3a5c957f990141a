"""Drawing one token for each of many requests: the engine's draw beside transformers' warpers.

    python benchmarks/drawing.py [--device cuda] [--rows 1,8,64,128] [--output FILE.json]

Logits are as peaked as a language model's (the n-th most likely token has a share of about
1/n**1.2) or, as an untrained model gives them, nearly equal, so that no shortlist suffices. Times
are those of a step: from logits on the device to ids on the host. Ours are the canonical draws,
which depend on seed, request and position only; transformers' are `torch.multinomial` after the
warpers it would use for the same settings.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / part) for part in ("", "backends")]
VOCAB, PROMPT, REPEATS = 151_936, 300, 10
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "temperature 1": {"temperature": 1.0},
    "temperature 1, nearly equal logits": {"temperature": 1.0},
    "top-p 0.95": {"temperature": 1.0, "top_p": 0.95},
    "Qwen2's defaults": {
        "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05,
    },
}  # fmt: skip


def logits_of(kind: str, rows: int, device: str) -> Any:
    """bfloat16 ``[rows, VOCAB]``."""
    import torch

    chance = torch.Generator(device).manual_seed(rows)
    if "equal" in kind:
        shape = rows, VOCAB
        return torch.randn(shape, generator=chance, device=device).bfloat16()
    places = torch.stack(
        [torch.randperm(VOCAB, generator=chance, device=device) for _ in range(rows)]
    )
    return (-1.2 * torch.log1p(places.float())).bfloat16()


def ours(kind: str, logits: Any) -> Callable[[], Any]:
    """A step of the engine's drawing."""
    import numpy as np

    from qwen2kit import Sampling
    from qwen2kit.engine.drawing import Block, draw
    from qwen2kit.engine.request import Request
    from qwen2kit.engine.sequence import start
    from qwen2kit_torch.engine.device_logits import logits_on_device

    chance = np.random.default_rng(0)
    sequences = [
        start(
            row,
            Request(
                tuple(chance.integers(0, VOCAB, PROMPT).tolist()),
                Sampling(seed=row, max_new_tokens=4096, **KINDS[kind]),
            ),
            8192,
        )
        for row in range(len(logits))
    ]
    held = logits_on_device(logits)
    return lambda: draw(held, [Block(sequence) for sequence in sequences])


def theirs(kind: str, logits: Any) -> Callable[[], Any]:
    """What transformers' ``generate`` does with logits."""
    import torch
    from transformers.generation import logits_process as warpers

    given = KINDS[kind]
    chain: list[Any] = []
    if "repetition_penalty" in given:
        chain.append(warpers.RepetitionPenaltyLogitsProcessor(given["repetition_penalty"]))
    if given:
        chain.append(warpers.TemperatureLogitsWarper(given["temperature"]))
    if "top_k" in given:
        chain.append(warpers.TopKLogitsWarper(given["top_k"]))
    if "top_p" in given:
        chain.append(warpers.TopPLogitsWarper(given["top_p"]))
    prompt = torch.randint(VOCAB, (len(logits), PROMPT), device=logits.device)

    def step() -> Any:
        scores = logits.float()
        for warper in chain:
            scores = warper(prompt, scores)
        if not given:
            return scores.argmax(-1).tolist()
        return torch.multinomial(scores.softmax(-1), 1).tolist()

    return step


def milliseconds(step: Callable[[], Any]) -> float:
    """Of one step; the median."""
    step(), step()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        step()
        times.append(1000 * (time.perf_counter() - start))
    return sorted(times)[REPEATS // 2]


def main() -> None:
    """Measure every kind and number of rows."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rows", default="1,8,64,128")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    cuda = options.device == "cuda"
    name = torch.cuda.get_device_name() if cuda else options.device
    report: dict[str, Any] = {"device": name, "torch": torch.__version__, "milliseconds": {}}
    for kind in KINDS:
        for rows in map(int, options.rows.split(",")):
            logits = logits_of(kind, rows, options.device)
            found = {
                "ours": milliseconds(ours(kind, logits)),
                "transformers": milliseconds(theirs(kind, logits)),
            }
            report["milliseconds"].setdefault(kind, {})[rows] = found
            print(
                f"{kind:36} {rows:4} rows  "
                + "  ".join(f"{k} {v:.2f} ms" for k, v in found.items()),
                flush=True,
            )
            if options.output:
                options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
