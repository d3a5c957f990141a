"""Options that say which model to load and how, as all commands that run one have them."""

from __future__ import annotations

from typing import Annotated

import typer

_MODEL = typer.Argument(help="Directory, GGUF file, run directory or hub id.")

Model = Annotated[str, _MODEL]
OptionalModel = Annotated[str | None, _MODEL]
BackendName = Annotated[str, typer.Option("--backend", help="torch, mlx or auto.")]
DType = Annotated[str, typer.Option("--dtype", help="float32, bfloat16, float16 or auto.")]
DeviceName = Annotated[str, typer.Option("--device", help="A device of the backend; see doctor.")]
Adapter = Annotated[
    str | None,
    typer.Option("--adapter", help="LoRA adapter of the model: directory, run or hub id."),
]
CacheBits = Annotated[
    int | None, typer.Option("--cache-bits", help="Keep keys and values in 8 or 4 bits (mlx).")
]
WeightBits = Annotated[
    int | None,
    typer.Option("--weight-bits", help="Quantise the layers to 8 or 4 bits while loading (torch)."),
]
