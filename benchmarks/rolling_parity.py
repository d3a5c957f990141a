"""Whole texts scored by ours, by lm-eval's ``hf`` model and in float64: who is how far off?

    python benchmarks/rolling_parity.py --model DIR --text wikitext-2/test.txt --output FILE.json

Texts are documents and paragraphs of a WikiText file (word tokens, ``= Title =`` headings), written
out by lm-eval's own ``wikitext`` task code and cut into its rolling windows. Each is scored in
float32 by ours, by ``hf`` as shipped (log-softmax in float32) and by ``hf`` with its log-softmax in
float64; and by the same ``hf`` class in float64 throughout: weights widened, norms, rotations and
softmax in float64 too, which transformers computes in float32 even in a double model. Against that
last one all others are measured. A difference is one of sums over a text, in nats; rounding adds up
with the tokens, so texts are grouped by length.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import expm1, sqrt
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks.wikitext.preprocess_wikitext import wikitext_detokenizer
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

from qwen2kit.backend.loading import load_model
from qwen2kit.backend.plan import ExecutionPlan
from qwen2kit.errors import ConfigError, DataError, Qwen2KitError
from qwen2kit.weights.checkpoint import open_checkpoint
from qwen2kit_evals.harness import Qwen2KitLM
from qwen2kit_evals.provenance import model_provenance

TRUTH = "float64"
PAIRS = (
    ("hf", TRUTH), ("hf, float64 softmax", TRUTH), ("torch", TRUTH), ("mlx", TRUTH),
    ("torch", "hf"), ("torch", "hf, float64 softmax"),
    ("mlx", "hf"), ("mlx", "hf, float64 softmax"), ("torch", "mlx"), ("hf, other batches", "hf"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Text:
    """One text.

    Attributes:
        kind: ``paragraph`` or ``document``.
        text: as the model reads it.
        words, size: lm-eval's counts of words and bytes, before the clean-up.
    """

    kind: str
    text: str
    words: int
    size: int


def main() -> int:
    options = arguments()
    try:
        texts = [*paragraphs(options.text, options.paragraphs)]
        texts += [*documents(options.text, options.documents, options.longest)]
        document = measure(options, texts)
    except Qwen2KitError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    show(document)
    return 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", required=True, help="directory in Hugging Face layout")
    parser.add_argument("--text", type=Path, required=True, help="a WikiText file")
    parser.add_argument("--paragraphs", type=int, default=16, help="of 400 to 600 characters")
    parser.add_argument("--documents", type=int, default=2, help="the first ones short enough")
    parser.add_argument("--longest", type=int, default=12000, help="characters of a document")
    parser.add_argument("--max-length", type=int, default=2048, help="tokens of a window")
    parser.add_argument("--backends", default="torch,mlx")
    parser.add_argument("--other-batches", type=int, help="hf once more, so many texts at once")
    parser.add_argument("--skip-float64", action="store_true", help="it takes most of the time")
    parser.add_argument("--output", type=Path, help="JSON file, written after every model")
    return parser.parse_args()


def paragraphs(path: Path, count: int) -> Iterator[Text]:
    """Paragraphs of 400 to 600 characters, evenly spread over the file."""
    found = [line for line in _read(path).splitlines() if 400 <= len(line) <= 600]
    if len(found) < count:
        raise DataError(f"{path.name} has {len(found)} such paragraphs; ask for fewer than {count}")
    return (_text("paragraph", found[len(found) * i // count]) for i in range(count))


def documents(path: Path, count: int, longest: int) -> Iterator[Text]:
    """The first whole articles of at most ``longest`` characters, with their headings."""
    pages = re.split(r"(?m)^(?= = [^=\n]+ = $)", _read(path))
    found = [page for page in pages if longest / 3 < len(page) <= longest]
    if len(found) < count:
        raise DataError(f"{path.name} has {len(found)} such articles; ask for fewer than {count}")
    return (_text("document", page) for page in found[:count])


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; name a WikiText file") from None


def _text(kind: str, page: str) -> Text:
    words, size = len(re.split(r"\s+", page)), len(page.encode())
    return Text(kind, wikitext_detokenizer({"page": page}), words, size)


def measure(options: argparse.Namespace, texts: list[Text]) -> dict[str, Any]:
    """Score all texts with every model, one model in memory at a time."""
    tokenizer = open_checkpoint(Path(options.model)).tokenizer()
    document: dict[str, Any] = {
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()},
        "texts": [
            {"kind": t.kind, "tokens": len(tokenizer.encode(t.text)), "words": t.words,
             "bytes": t.size, "logprob": {}}
            for t in texts
        ],
        "seconds": {},
    }  # fmt: skip
    for name, build in models(options, tokenizer.eot_id).items():
        model = build()
        if name in options.backends:
            document["model"] = model_provenance(model.loaded)
        start = time.perf_counter()
        found = model.loglikelihood_rolling(
            [Instance("loglikelihood_rolling", {}, (text.text,), i) for i, text in enumerate(texts)]
        )
        document["seconds"][name] = round(time.perf_counter() - start, 1)
        for row, total in zip(document["texts"], found, strict=True):
            row["logprob"][name] = float(total)
        document["summary"] = summary(document["texts"])
        if options.output:
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_text(json.dumps(document, indent=2) + "\n")
        del model
        gc.collect()
    return document


def models(options: argparse.Namespace, prefix: int) -> dict[str, Callable[[], Any]]:
    """What builds each model, by name."""

    def ours(backend: str) -> Any:
        device = "cpu" if backend == "torch" else "auto"
        plan = ExecutionPlan(dtype="float32", device=device)
        loaded = load_model(options.model, backend=backend, plan=plan)
        return Qwen2KitLM(loaded, max_length=options.max_length)

    def theirs(softmax: str, double: bool = False, together: int = 1) -> Any:
        held: Any = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
        return HFLM(
            widened(held) if double else held,
            tokenizer=options.model,
            max_length=options.max_length,
            softmax_dtype=softmax,
            batch_size=together,
            device="cpu",
            prefix_token_id=prefix,
        )

    built = {name: lambda name=name: ours(name) for name in options.backends.split(",")}
    built["hf"] = lambda: theirs("float32")
    built["hf, float64 softmax"] = lambda: theirs("float64")
    if options.other_batches:
        built["hf, other batches"] = lambda: theirs("float32", together=options.other_batches)
    if not options.skip_float64:
        built[TRUTH] = lambda: theirs("float64", double=True)
    return built


def widened(model: Any) -> Any:
    """``model`` (transformers' Qwen2) in float64, where it insists on float32 too."""
    rope = model.config.rope_parameters
    if rope["rope_type"] != "default":
        raise ConfigError(f"rotations of type {rope['rope_type']} are not known here in float64")
    model = model.double()
    rotary = model.model.rotary_emb
    steps = torch.arange(0, 2 * len(rotary.inv_freq), 2, dtype=torch.float64)
    frequencies = rope["rope_theta"] ** (-steps / (2 * len(rotary.inv_freq)))

    def tables(x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        half = position_ids[..., None].double() * frequencies
        angles = torch.cat([half, half], -1)
        return angles.cos(), angles.sin()

    rotary.forward = tables
    for module in model.modules():
        if type(module).__name__ == "Qwen2RMSNorm":
            module.forward = _norm(module)
    return model


def _norm(module: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    def forward(x: torch.Tensor) -> torch.Tensor:
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + module.variance_epsilon)
        return module.weight * (x * scale)

    return forward


def summary(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Differences per kind of text and pair of models."""
    found: dict[str, dict[str, Any]] = {}
    for kind in dict.fromkeys(row["kind"] for row in rows):
        own = [row for row in rows if row["kind"] == kind]
        found[kind] = {
            "texts": len(own),
            "tokens": [min(r["tokens"] for r in own), max(r["tokens"] for r in own)],
            "pairs": {
                f"{a} - {b}": differences(own, a, b)
                for a, b in PAIRS
                if {a, b} <= own[0]["logprob"].keys()
            },
        }
    return found


def differences(rows: list[dict[str, Any]], first: str, second: str) -> dict[str, float]:
    gaps = [row["logprob"][first] - row["logprob"][second] for row in rows]
    tokens = [row["tokens"] for row in rows]
    return {
        "max": max(map(abs, gaps)),
        "rms": sqrt(sum(g * g for g in gaps) / len(gaps)),
        "within_1e-3": sum(abs(g) <= 1e-3 for g in gaps),
        "mean_per_token": sum(gaps) / sum(tokens),
        # Relative; lm-eval weighs over all texts together.
        "word_perplexity": expm1(-sum(gaps) / sum(row["words"] for row in rows)),
        "byte_perplexity": expm1(-sum(gaps) / sum(row["bytes"] for row in rows)),
    }


def show(document: dict[str, Any]) -> None:
    for kind, found in document["summary"].items():
        low, high = found["tokens"]
        table = Table(title=f"{found['texts']} {kind}s of {low} to {high} tokens, nats")
        for heading in ("", "max", "rms", "within 1e-3", "per token", "word perplexity"):
            table.add_column(heading, justify="right" if heading else "left")
        for pair, d in found["pairs"].items():
            table.add_row(
                pair,
                f"{d['max']:.1e}",
                f"{d['rms']:.1e}",
                str(d["within_1e-3"]),
                f"{d['mean_per_token']:+.1e}",
                f"{d['word_perplexity']:+.1e}",
            )
        Console().print(table)


if __name__ == "__main__":
    raise SystemExit(main())
