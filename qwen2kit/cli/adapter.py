"""``qwen2kit convert ADAPTER OUT``: a LoRA adapter alone, between PEFT's and mlx-lm's layout."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from qwen2kit.cli.output import console, emit_json
from qwen2kit.errors import ConfigError


def convert_alone(
    directory: Path,
    out: Path,
    to: str,
    dtype: str | None,
    whole: Mapping[str, object],
    *,
    force: bool,
    json_output: bool,
) -> None:
    """Convert the adapter in ``directory`` and say what was written.

    Args:
        whole: options that make sense for whole models only, with their values (None: not given).

    Raises:
        ConfigError: one of those is given, or ``to`` is gguf.
    """
    from qwen2kit.adapters.directory import convert_adapter, open_adapter

    given = [option for option, value in whole.items() if value is not None]
    if given or to == "gguf":
        raise ConfigError(
            f"{directory} is an adapter, for which there is no {given[0] if given else '--to gguf'}"
            "; merge it into its model: qwen2kit convert BASE OUT --adapter ADAPTER"
        )
    report = convert_adapter(
        open_adapter(directory),
        out,
        to="mlx" if to == "mlx" else "hf",
        dtype=dtype,  # type: ignore[arg-type]
        force=force,
    )
    if json_output:
        emit_json(report.to_dict())
    layouts = {"hf": "PEFT", "mlx": "mlx-lm"}
    console().print(
        f"adapter of {report.modules} matrices, rank {report.rank}: "
        f"{report.source} ({layouts[report.source_format]}) -> {report.out} "
        f"({layouts[report.format]}), {report.dtype}, {report.bytes / 1e6:.1f} MB",
        markup=False,
        soft_wrap=True,
    )
