"""Tokenising and loading of training data beside Hugging Face datasets and torch's DataLoader.

    QWEN2KIT_DATASETS=DIR python benchmarks/data_loading.py --tokenizer MODEL [--output FILE.json]

Tokenising: English text of ``DIR/training`` (wikitext-2, C4 and Wikipedia samples), one document
per line or row, repeated to ``--megabytes``; files in, tokens on disk. The peer is
``datasets.load_dataset("json").map(batched=True)`` with the same `tokenizers` encoder, one thread
per process in both. Runs alternate; wall time and processor time of all processes are reported
(the latter does not depend on what else the machine does).

Loading: batches of ``--rows`` rows of 4,096 tokens in random order. The peer is a torch DataLoader
over one ``numpy.memmap`` of the same tokens, which cuts windows without regard to documents and
yields inputs and labels only; ours adds positions and document numbers. The last figures are what
``next_batch`` costs a loop whose step takes 50 ms.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SEQ_LEN = 4096
STEP_SECONDS = 0.05


def documents(root: Path) -> Iterator[str]:
    for name in (
        "wikitext-2/train_part.txt",
        "wikitext-2/test.txt",
        "llamafactory-demo/wiki_demo.txt",
    ):
        for line in (root / name).read_text(encoding="utf-8").splitlines():
            if line.strip():
                yield line
    for line in (root / "llamafactory-demo/c4_demo.jsonl").read_text(encoding="utf-8").splitlines():
        yield json.loads(line)["text"]


def write_corpus(root: Path, folder: Path, megabytes: int) -> int:
    """Four JSONL files of about ``megabytes`` MB in all; returns the exact bytes."""
    rows = [json.dumps({"text": text}, ensure_ascii=False) for text in documents(root)]
    size = sum(len(row.encode()) + 1 for row in rows)
    copies = max(1, round(megabytes * 1e6 / size))
    lines = rows * copies
    share = -(-len(lines) // 4)
    for part in range(4):
        text = "\n".join(lines[part * share : (part + 1) * share]) + "\n"
        (folder / f"{part}.jsonl").write_text(text, encoding="utf-8")
    return size * copies


# Each of these runs in a process of its own: `python data_loading.py --run NAME ARGUMENTS`.


def run_ours(folder: str, tokenizer: str, workers: str, out: str) -> dict[str, Any]:
    from qwen2kit.config.data_tree import JsonlData
    from qwen2kit.data.tokenize_job import tokenize
    from qwen2kit.tokenizer.bpe import Tokenizer

    encoder = Tokenizer.from_dir(Path(tokenizer))
    data = JsonlData(paths=(f"{folder}/*.jsonl",))
    start = time.perf_counter()
    index = tokenize(
        data, encoder, "pretrain", Path(out),
        workers=int(workers), shard_bytes=4_000_000, progress=lambda done: None,
    )  # fmt: skip
    return {"seconds": time.perf_counter() - start, "tokens": index.total("tokens")}


def run_datasets(folder: str, tokenizer: str, workers: str, out: str) -> dict[str, Any]:
    import datasets
    import tokenizers

    datasets.disable_progress_bars()
    encoder = tokenizers.Tokenizer.from_file(f"{tokenizer}/tokenizer.json")
    end = encoder.token_to_id("<|endoftext|>")

    def encode(batch: dict[str, list[str]]) -> dict[str, Any]:
        found = encoder.encode_batch_fast(batch["text"], add_special_tokens=False)
        return {"ids": [[*encoding.ids, end] for encoding in found]}

    start = time.perf_counter()
    files = sorted(map(str, Path(folder).glob("*.jsonl")))
    loaded = datasets.load_dataset("json", data_files=files, split="train", cache_dir=out)
    features = datasets.Features({"ids": datasets.Sequence(datasets.Value("int32"))})
    mapped = loaded.map(
        encode, batched=True, num_proc=int(workers), remove_columns=["text"], features=features
    )
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "tokens": sum(map(len, mapped.with_format("numpy")["ids"]))}


def our_source(shards: str, data: Any, rows: int) -> Any:
    from qwen2kit.data.loader import Loader
    from qwen2kit.data.open_data import DataOpener
    from qwen2kit.data.row_source import RowLayout
    from qwen2kit.tokenizer.bpe import Tokenizer

    tokenizer = Tokenizer.from_dir(Path(shards) / "tokenizer")
    layout = RowLayout(seq_len=SEQ_LEN, seed=0, pad_id=tokenizer.eot_id, split=True)
    opener = DataOpener(
        tokenizer=tokenizer, task="pretrain", layout=layout, too_long="refuse", note=print
    )
    return Loader(opener.source(data), batch_rows=rows)


def torch_batches(shards: Path, rows: int, workers: int) -> Iterator[Any]:
    """Shuffled windows of one flat file, as a plain PyTorch loader reads them."""
    import numpy as np
    import torch
    from torch.utils.data import DataLoader, Dataset

    flat = shards.parent / "flat.bin"
    flat.write_bytes(b"".join(path.read_bytes() for path in sorted(shards.glob("*.tokens"))))

    class Windows(Dataset[Any]):
        def __init__(self) -> None:
            self.tokens = np.memmap(flat, dtype=np.uint32, mode="r")

        def __len__(self) -> int:
            return (len(self.tokens) - 1) // SEQ_LEN

        def __getitem__(self, index: int) -> Any:
            start = index * SEQ_LEN
            window = torch.from_numpy(self.tokens[start : start + SEQ_LEN + 1].astype(np.int64))
            return window[:-1], window[1:]

    while True:
        yield from DataLoader(Windows(), rows, shuffle=True, num_workers=workers, drop_last=True)


def rate(next_batch: Callable[[], Any], seconds: float) -> dict[str, float]:
    """Batches per second, and processor milliseconds per batch of this process's threads."""
    next_batch()
    count, start, cpu = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - start < seconds:
        next_batch()
        count += 1
    return {
        "batches_per_s": count / (time.perf_counter() - start),
        "cpu_ms_per_batch": 1e3 * (time.process_time() - cpu) / count,
    }


def wait(next_batch: Callable[[], Any], seconds: float) -> float:
    """Median milliseconds that a loop with steps of `STEP_SECONDS` waits for its batch."""
    next_batch()
    waits = []
    for _ in range(max(5, int(seconds / STEP_SECONDS))):
        time.sleep(STEP_SECONDS)
        start = time.perf_counter()
        next_batch()
        waits.append(1e3 * (time.perf_counter() - start))
    return statistics.median(waits)


def run_loading(folder: str, shards: str, rows: str, seconds: str) -> dict[str, Any]:
    from qwen2kit.config.data_tree import JsonlData, ShardData
    from qwen2kit.data.background import Prefetched

    count, limit = int(rows), float(seconds)
    data = ShardData(paths=(shards,))
    files = JsonlData(paths=(f"{folder}/*.jsonl",), stream=True, shuffle_rows=64)
    ahead = Prefetched(our_source(shards, data, count))
    streamed = Prefetched(our_source(shards, files, count))
    plain = our_source(shards, data, count)
    result = {
        "throughput": {
            "shards": rate(plain.next_batch, limit),
            "torch DataLoader": rate(torch_batches(Path(shards), count, 0).__next__, limit),
            "shards, prefetched": rate(ahead.next_batch, limit),
            "torch DataLoader, 1 worker": rate(
                torch_batches(Path(shards), count, 1).__next__, limit
            ),
            "stream, prefetched": rate(streamed.next_batch, limit),
        },
        "wait_ms": {
            "shards": wait(plain.next_batch, limit),
            "shards, prefetched": wait(ahead.next_batch, limit),
            "stream, prefetched": wait(streamed.next_batch, limit),
        },
    }
    ahead.close()
    streamed.close()
    return result


RUNS = {"ours": run_ours, "datasets": run_datasets, "loading": run_loading}


def child(name: str, *arguments: object) -> dict[str, Any]:
    """Run one of `RUNS`; its figures with the processor seconds of it and its children."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    env = os.environ | {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, "--run", name, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = dict(json.loads(done.stdout.splitlines()[-1]))
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return result | {"cpu_seconds": cpu}


def measure_tokenizing(
    folder: Path, tokenizer: Path, out: Path, options: argparse.Namespace
) -> dict[str, Any]:
    runs: dict[str, list[dict[str, Any]]] = {}
    for _ in range(options.repeats):
        for workers in options.workers:
            for name in ("ours", "datasets"):
                shutil.rmtree(out, ignore_errors=True)
                out.mkdir()
                result = child(name, folder, tokenizer, workers, out)
                runs.setdefault(f"{name}, {workers} workers", []).append(result)
    found: dict[str, Any] = {}
    for name, results in runs.items():
        found[name] = {
            "tokens": results[0]["tokens"],
            "tokens_per_s": [r["tokens"] / r["seconds"] for r in results],
            "cpu_s_per_million_tokens": [1e6 * r["cpu_seconds"] / r["tokens"] for r in results],
        }
    assert len({values["tokens"] for values in found.values()}) == 1, "the tokens differ"
    return found


def show(report: dict[str, Any]) -> None:
    print(f"{'':24}{'tokens/s':>12}{'CPU s / M tokens':>20}")
    for name, values in report["tokenizing"].items():
        speed = statistics.median(values["tokens_per_s"])
        cost = statistics.median(values["cpu_s_per_million_tokens"])
        print(f"{name:24}{speed:12,.0f}{cost:20.2f}")
    print(f"{'':30}{'batches/s':>12}{'CPU ms/batch':>14}{'tokens/s':>14}")
    for name, values in report["loading"]["throughput"].items():
        speed, cost = values["batches_per_s"], values["cpu_ms_per_batch"]
        tokens = speed * report["rows"] * SEQ_LEN
        print(f"{name:30}{speed:12.1f}{cost:14.2f}{tokens:14,.0f}")
    print("milliseconds that a step of 50 ms waits for its batch")
    for name, value in report["loading"]["wait_ms"].items():
        print(f"  {name:30}{value:10.2f}")


def machine() -> dict[str, Any]:
    packages = ("qwen2kit", "tokenizers", "datasets", "pyarrow", "torch", "numpy")
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "")
    return {
        "cpu": cpu or platform.processor(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in packages},
    }


def main() -> None:
    if sys.argv[1:2] == ["--run"]:
        print(json.dumps(RUNS[sys.argv[2]](*sys.argv[3:])))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", required=True, help="a model, e.g. a .gguf file")
    parser.add_argument("--datasets", default=os.environ.get("QWEN2KIT_DATASETS"))
    parser.add_argument("--megabytes", type=int, default=24)
    parser.add_argument("--workers", type=lambda s: [int(x) for x in s.split(",")], default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if options.datasets is None:
        parser.error("set QWEN2KIT_DATASETS or --datasets")
    from qwen2kit.train.setup import open_tokenizer

    with tempfile.TemporaryDirectory(prefix="qwen2kit-data-") as place:
        root, folder, tokenizer = Path(place), Path(place) / "text", Path(place) / "tokenizer"
        folder.mkdir()
        open_tokenizer(options.tokenizer).save(tokenizer)
        size = write_corpus(Path(options.datasets) / "training", folder, options.megabytes)
        report: dict[str, Any] = {
            "machine": machine(),
            "command": " ".join(["python benchmarks/data_loading.py", *sys.argv[1:]]),
            "bytes": size,
            "rows": options.rows,
            "tokenizing": measure_tokenizing(folder, tokenizer, root / "out", options),
        }
        child("ours", folder, tokenizer, 2, root / "shards")
        report["loading"] = child("loading", folder, root / "shards", options.rows, options.seconds)
    show(report)
    if options.output:
        options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
