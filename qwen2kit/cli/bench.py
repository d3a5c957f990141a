"""``qwen2kit bench``: how fast a model loads, reads and writes, beside what the device can do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qwen2kit.cli.drafting import (
    DraftOption,
    PromptLookupOption,
    check_guessing,
    drafter_maker,
)
from qwen2kit.cli.model_options import (
    BackendName,
    CacheBits,
    DeviceName,
    DType,
    OptionalModel,
    WeightBits,
)
from qwen2kit.cli.output import console, emit_json, show_notes
from qwen2kit.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.status import Status

    from qwen2kit.backend.plan import ExecutionPlan
    from qwen2kit.backend.values import LoadReport
    from qwen2kit.bench.run import Subject
    from qwen2kit.engine.drafting import Drafter
    from qwen2kit.weights.checkpoint import Checkpoint


def bench(
    model: OptionalModel = None,
    random: Annotated[
        str | None,
        typer.Option(help="Random weights of a preset instead, e.g. qwen2-7b: needs no files."),
    ] = None,
    backend: BackendName = "auto",
    dtype: DType = "auto",
    device: DeviceName = "auto",
    weight_bits: WeightBits = None,
    cache_bits: CacheBits = None,
    prefill: Annotated[str, typer.Option(help="Prompt lengths in tokens; '' skips.")] = (
        "128,512,2048"
    ),
    contexts: Annotated[
        str, typer.Option(help="Tokens before decoding one stream; '' skips.")
    ] = "512",
    streams: Annotated[str, typer.Option(help="Streams decoded together; '' skips.")] = "1,8,64",
    prompt: Annotated[int, typer.Option(help="Prompt tokens of each of these.")] = 128,
    new: Annotated[int, typer.Option(help="Generated tokens.")] = 64,
    repeats: Annotated[int, typer.Option(help="Repetitions of prefill and decoding.")] = 3,
    draft: DraftOption = None,
    prompt_lookup: PromptLookupOption = None,
    plot: Annotated[Path | None, typer.Option(help="Write the curves to this PNG.")] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Measure load time, prefill, decoding, many streams, latency and memory of a model.

    Every speed stands beside its roof: bytes over measured bandwidth, products over measured rate.
    """
    from qwen2kit.adapters.merge import open_model
    from qwen2kit.backend.plan import ExecutionPlan
    from qwen2kit.bench.report import show
    from qwen2kit.bench.run import Workload, measured_roof
    from qwen2kit.bench.run import bench as run

    if (model is None) == (random is None):
        raise ConfigError("give a MODEL, or --random PRESET for random weights")
    if random is not None and (draft is not None or prompt_lookup is not None):
        raise ConfigError("random weights say nothing that could be guessed; give a MODEL")
    work = Workload(
        prefill=_numbers("--prefill", prefill),
        contexts=_numbers("--contexts", contexts),
        streams=_numbers("--streams", streams),
        prompt=prompt,
        new=new,
        repeats=repeats,
    )
    check_guessing(draft, prompt_lookup)
    _check_plot(plot)
    plan = ExecutionPlan(device=device, dtype=dtype, weight_bits=weight_bits, cache_bits=cache_bits)
    screen = console()
    with screen.status("opening") as status:
        notice = _notice(screen, status)
        checkpoint = None if model is None else open_model(model)
        subject = (
            _random(str(random), backend, plan)
            if checkpoint is None
            else _stored(str(model), checkpoint, backend, plan)
        )
        roof = measured_roof(subject, work, notice)
        notice("loading")
        report = subject.model.load(subject.weights)
        show_notes(report.notes)
        drafter = None
        if checkpoint is not None:
            show_notes(checkpoint.notes)
            drafter = _drafter(subject, checkpoint, report, draft, prompt_lookup)
        document = run(subject, work, report=report, roof=roof, drafter=drafter, notice=notice)
    for failure in document["failures"]:
        screen.print(f"left out: {failure}", markup=False, soft_wrap=True)
    if json:
        emit_json(document)
    else:
        show(document, screen)
    if plot is not None:
        _plot(plot, document)


def _notice(screen: Console, status: Status) -> Callable[[str], None]:
    """The status line, or a line each where there is no terminal to keep one."""
    if screen.is_terminal:
        return status.update
    return lambda text: screen.print(text, markup=False, soft_wrap=True)


def _numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ConfigError(f"{option} takes numbers separated by commas, got {text!r}") from None


def _stored(name: str, checkpoint: Checkpoint, backend: str, plan: ExecutionPlan) -> Subject:
    """A checkpoint's model, not loaded yet."""
    from qwen2kit.backend.registry import get
    from qwen2kit.bench.prompts import text_prompts
    from qwen2kit.bench.run import Subject

    chosen, tokenizer = get(backend), checkpoint.tokenizer()
    return Subject(
        name=name,
        backend=chosen,
        model=chosen.compile(checkpoint.spec, plan),
        plan=plan,
        weights=checkpoint.weights,
        prompts=text_prompts(tokenizer),
        vocab_limit=min(tokenizer.vocab_size, checkpoint.spec.vocab_size),
    )


def _drafter(
    subject: Subject,
    checkpoint: Checkpoint,
    report: LoadReport,
    draft: str | None,
    prompt_lookup: int | None,
) -> Callable[[int, int], Drafter] | None:
    from qwen2kit.backend.loading import LoadedModel

    if draft is None and prompt_lookup is None:
        return None
    loaded = LoadedModel(
        checkpoint=checkpoint,
        tokenizer=checkpoint.tokenizer(),
        backend=subject.backend,
        model=subject.model,
        report=report,
        plan=subject.plan,
    )
    return drafter_maker(loaded, draft, prompt_lookup)


def _random(preset_name: str, backend: str, plan: ExecutionPlan) -> Subject:
    from qwen2kit.backend.meter import MeteredBackend
    from qwen2kit.backend.registry import get
    from qwen2kit.bench.prompts import random_prompts
    from qwen2kit.bench.random_weights import RandomSource
    from qwen2kit.bench.run import Subject
    from qwen2kit.spec.presets import preset

    chosen, spec = get(backend), preset(preset_name)
    named = chosen.meter(plan).dtype if isinstance(chosen, MeteredBackend) else plan.dtype
    weights = RandomSource(spec, "float32" if named == "auto" else named)  # type: ignore[arg-type]
    return Subject(
        name=f"{preset_name} (random weights)",
        backend=chosen,
        model=chosen.compile(spec, plan),
        plan=plan,
        weights=weights,
        prompts=random_prompts(spec.vocab_size),
    )


def _check_plot(path: Path | None) -> None:
    """What can be known of the picture's path before anything is measured."""
    if path is None:
        return
    if path.suffix.lower() != ".png":
        raise ConfigError(f"--plot writes a PNG; name a .png file, not {path.name}")
    if not path.parent.is_dir():
        raise ConfigError(f"--plot: there is no directory {path.parent}")


def _plot(path: Path, document: dict[str, Any]) -> None:
    from qwen2kit.bench.plot import plot_bench

    written = plot_bench(path, document)
    note = f"curves: {path}" if written else "no curves: matplotlib is not installed"
    console().print(note, markup=False, soft_wrap=True)
