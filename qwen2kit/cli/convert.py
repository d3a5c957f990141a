"""``qwen2kit convert``: between Hugging Face, MLX and GGUF, with proof on request."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from qwen2kit.cli.output import console, emit_json, progress, show_notes
from qwen2kit.errors import ConfigError

if TYPE_CHECKING:
    from qwen2kit.weights.checkpoint import Checkpoint
    from qwen2kit.weights.convert import ConversionReport
    from qwen2kit.weights.verify import VerifyReport

_UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
}


def convert(
    model: Annotated[
        str,
        typer.Argument(help="Directory, GGUF file, run directory or hub id; or an adapter alone."),
    ],
    out: Annotated[Path, typer.Argument(help="Output directory, or a .gguf file.")],
    to: Annotated[
        str | None, typer.Option(help="hf, mlx or gguf; default: gguf for a .gguf name, else hf.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; default: the source's.")
    ] = None,
    bits: Annotated[
        int | None, typer.Option(help="mlx: quantise to 4 or 8 bits (2, 3, 6 too).")
    ] = (None),
    group_size: Annotated[int, typer.Option(help="mlx: values that share a scale.")] = 64,
    gguf_type: Annotated[
        str | None, typer.Option(help="gguf: f32, f16, bf16 or q8_0; default: that of the dtype.")
    ] = None,
    adapter: Annotated[
        str | None, typer.Option(help="Merge this LoRA adapter: directory, run or hub id.")
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare tensors, and logits on every backend.")
    ] = False,
    tolerance: Annotated[float, typer.Option(help="--verify: largest |difference| of logits.")] = (
        1e-3
    ),
    report: Annotated[
        str | None,
        typer.Option(
            help="Measure the loss on this text file (auto: built-in passages); default when "
            "quantising: auto."
        ),
    ] = None,
    no_report: Annotated[
        bool, typer.Option("--no-report", help="Do not measure the loss of quantising.")
    ] = False,
    max_shard_size: Annotated[str, typer.Option(help="Largest safetensors file.")] = "5GB",
    force: Annotated[bool, typer.Option("--force", help="Replace an existing model.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """Convert a checkpoint; nothing appears under OUT before it is complete.

    With --adapter, a LoRA adapter is merged into it. Given an adapter instead of a model, the
    adapter alone is converted: --to hf is PEFT's layout, --to mlx is mlx-lm's.

    Quantising reports perplexity, KL divergence and agreement with the original on held-out text.
    """
    from qwen2kit.adapters.directory import is_adapter
    from qwen2kit.adapters.merge import open_model
    from qwen2kit.cli.convert_quality import Quality
    from qwen2kit.weights.convert import convert as run
    from qwen2kit.weights.locate import locate

    target = _target(to, out)
    limit = parse_size(max_shard_size)
    if not 0 <= tolerance < float("inf"):
        raise ConfigError(f"--tolerance must be a number of at least 0, got {tolerance}")
    if adapter is None and is_adapter(locate(model)):
        from qwen2kit.cli.adapter import convert_alone

        whole = {"--bits": bits, "--gguf-type": gguf_type, "--verify": verify or None,
                 "--report": report}  # fmt: skip
        convert_alone(
            locate(model), out, target, dtype, whole, force=force, json_output=json_output
        )
        return
    source = open_model(model, adapter)
    quality = Quality.asked(source, report, no_report, bits is not None or gguf_type == "q8_0")
    with progress("converting") as step:
        done = run(
            source,
            out,
            to=target,
            dtype=dtype,  # type: ignore[arg-type]
            quantize_bits=bits,
            group_size=group_size,
            gguf_type=gguf_type,  # type: ignore[arg-type]
            max_shard_bytes=limit,
            force=force,
            progress=step,
        )
    proof = _prove(source, out, tolerance) if verify else None
    loss = None if quality is None else quality.measure(out)
    if json_output:
        proven = None if proof is None else proof.to_dict()
        emit_json({**done.to_dict(), "verify": proven, "quality": loss})
    _print(done, proof)
    if quality is not None:
        quality.print()
    show_notes(source.notes)
    if proof is not None:
        proof.require()


def parse_size(text: str, option: str = "--max-shard-size") -> int:
    """Bytes of ``5GB``, ``500 MiB`` or a plain number. Raises ConfigError naming ``option``."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]?i?B?)\s*", text, re.IGNORECASE)
    unit = match[2].upper() if match else "?"
    size = float(match[1]) * _UNITS[unit] if match and unit in _UNITS else 0
    if size < 1:
        raise ConfigError(f"{option} must look like 5GB or 500MB, got {text!r}")
    return int(size)


def _target(to: str | None, out: Path) -> Literal["hf", "mlx", "gguf"]:
    if to is None:
        return "gguf" if out.suffix.lower() == ".gguf" else "hf"
    for name in ("hf", "mlx", "gguf"):
        if to == name:
            return name
    raise ConfigError(f"--to must be hf, mlx or gguf, got {to!r}")


def _prove(source: Checkpoint, out: Path, tolerance: float) -> VerifyReport:
    from qwen2kit.weights.checkpoint import open_checkpoint
    from qwen2kit.weights.verify import verify

    with progress("verifying") as step:
        return verify(
            source,
            open_checkpoint(out),
            tolerance=tolerance,
            strict=False,
            progress=step,
        )


def _print(report: ConversionReport, proof: VerifyReport | None) -> None:
    from rich.table import Table

    rows: list[tuple[str, Any]] = [
        ("source", f"{report.source} ({report.source_format})"),
        *([] if report.adapter is None else [("with adapter", report.adapter)]),
        ("output", f"{report.out} ({report.format})"),
        (
            "stored as",
            f"{report.dtype}" + (f", {report.quantization}" if report.quantization else ""),
        ),
        ("parameters", f"{report.tensors} tensors"),
        ("size", f"{report.bytes / 1e6:.1f} MB"),
        ("time", f"{report.seconds:.1f} s"),
    ]
    table = Table(title="converted", show_header=False)
    for key, value in rows:
        table.add_row(key, str(value))
    console().print(table)
    if proof is not None:
        _print_proof(proof)


def _print_proof(proof: VerifyReport) -> None:
    from rich.table import Table

    worst = max(proof.tensors, key=lambda check: check.max_abs)
    verdicts = ", ".join(f"{count} {name}" for name, count in proof.verdicts.items())
    out = console()
    out.print(f"tensors: {verdicts}; largest difference {worst.max_abs:.2e} in {worst.name}")
    table = Table(title=f"logits in float32, tolerance {proof.tolerance:g}")
    for heading in ("first", "second", "max |Δ|", "median |Δ|", "KL (nats)", "top-1", ""):
        table.add_column(heading)
    for check in proof.logits:
        delta = check.delta
        verdict = "ok" if check.passed else "FAIL"
        table.add_row(
            check.first, check.second, f"{delta.max_abs:.2e}", f"{delta.median_abs:.2e}",
            f"{delta.kl:.2e}", f"{delta.top1_agreement:.1%}",
            verdict if check.binding else "loss of the conversion",
        )  # fmt: skip
    out.print(table)
    for check in proof.logits:
        if check.layers is not None:
            out.print(f"{check.first} / {check.second}: first difference: {check.layers.where}")
            errors = ", ".join(f"{value:.1e}" for value in check.layers.relative)
            out.print(f"  relative error per state (embedding, layers, norm): {errors}")
    for name, reason in proof.not_applicable.items():
        out.print(f"not run on {name}: {reason}", markup=False)
