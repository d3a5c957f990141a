"""GGUF as a WeightSource: canonical names, blocks dequantised to float32 on reading.

F32, F16 and BF16 tensors stay what they are; every other block type of the gguf library is
dequantised. Qwen2 needs no row permutation (its rotary layout is the half-split one in GGUF too).
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen2kit.errors import ConfigError, WeightError
from qwen2kit.spec.model import ModelSpec
from qwen2kit.spec.schema import EMBED_TOKENS
from qwen2kit.weights.generation import END_TOKENS, GenerationDefaults, stop_ids
from qwen2kit.weights.gguf_file import GgufFile, GgufTensor
from qwen2kit.weights.gguf_names import GGUF_EMBED, GGUF_HEAD, gguf_slots
from qwen2kit.weights.gguf_spec import spec_from_gguf
from qwen2kit.weights.source import AffineTensor, TensorInfo
from qwen2kit.weights.tensor import DType, HostTensor, from_numpy

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_DENSE: dict[str, DType] = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_SAMPLE_ROWS = 256
_CHUNK_ELEMENTS = 1 << 22

# Relative error that rounding to a block type may cause, by bits; two copies of one matrix in
# different types differ by no more than the sum. Unrelated matrices differ by about 1.4.
_NOISE = {2: 0.45, 3: 0.3, 4: 0.16, 5: 0.09, 6: 0.05, 8: 0.02, 16: 0.005, 32: 0.0}


class GgufSource:
    """Tensors of an opened GGUF file by canonical name.

    Args:
        spec: the model the file holds.
        file: the container.
        tied_to: GGUF name of the tensor that serves as embedding (and head) of a tied model.
    """

    def __init__(self, spec: ModelSpec, file: GgufFile, tied_to: str = GGUF_EMBED) -> None:
        self.file = file
        self._home: dict[str, tuple[str, int | None]] = {}
        known = {GGUF_EMBED, GGUF_HEAD}
        for slot in gguf_slots(spec):
            known.add(slot.name)
            for index, param in enumerate(slot.params):
                if slot.name in file.tensors:
                    self._home[param.name] = (slot.name, index if slot.stacked else None)
        if spec.tie_word_embeddings:
            self._home[EMBED_TOKENS] = (tied_to, None)
        self._one_row = {p.name for s in gguf_slots(spec) for p in s.params if p.shape[0] == 1}
        self._names = (*self._home, *(name for name in file.tensors if name not in known))

    @property
    def dtype(self) -> DType:
        """Float dtype of the matrices; bfloat16 stands in for quantised ones."""
        return _DENSE.get(self._tensor(EMBED_TOKENS).type.name, "bfloat16")

    def block_type(self, name: str) -> str:
        """GGML name of the type a parameter is stored in, e.g. ``Q8_0``."""
        return str(self._tensor(name).type.name)

    def names(self) -> tuple[str, ...]:
        """Canonical names; tensors the spec does not know keep their GGUF name."""
        return self._names

    def info(self, name: str) -> TensorInfo:
        """Dtype (float32 for block types) and shape."""
        tensor = self._tensor(name)
        shape = tensor.shape if self._expert(name) is None else tensor.shape[1:]
        if name in self._one_row and len(shape) == 1:
            shape = (1, *shape)
        return TensorInfo(_DENSE.get(tensor.type.name, "float32"), shape)

    def read(self, name: str) -> HostTensor:
        """The dense tensor; a view into the map unless it had to be dequantised.

        Raises:
            WeightError: unknown name, or a block type the gguf library cannot dequantise.
        """
        info, tensor = self.info(name), self._tensor(name)
        data = self.file.data(self._home[name][0] if name in self._home else name)
        expert = self._expert(name)
        if expert is not None:
            size = tensor.nbytes // tensor.shape[0]
            data = data[expert * size : (expert + 1) * size]
        if tensor.type.name in _DENSE:
            return HostTensor(info.dtype, info.shape, data)
        return from_numpy(_dequantize(self.file.path, tensor, data).reshape(info.shape))

    def affine(self, name: str) -> AffineTensor | None:
        """Always None: GGUF blocks are not MLX's."""
        return None

    def _expert(self, name: str) -> int | None:
        return self._home[name][1] if name in self._home else None

    def _tensor(self, name: str) -> GgufTensor:
        stored = self._home[name][0] if name in self._home else name
        try:
            return self.file.tensors[stored]
        except KeyError:
            raise WeightError(f"{self.file.path}: no tensor for {name!r}") from None


def open_gguf(path: Path) -> tuple[ModelSpec, GgufSource]:
    """Open a GGUF file of the Qwen2 family.

    Raises:
        WeightError: damaged, truncated, split, or without an embedding.
        ConfigError: another architecture, or metadata that is not understood.
    """
    file = GgufFile(path)
    if int(file.fields.get("split.count", 1) or 1) > 1:
        raise WeightError(
            f"{path}: is one part of a split GGUF; join the parts with: "
            "llama-gguf-split --merge FIRST OUTPUT"
        )
    try:
        if file.fields.get("general.architecture") in ("qwen2", "qwen2moe"):
            _require_embedding(file)
        tied_to = _tied_to(file)
        vocab = file.tensors[GGUF_EMBED].shape[0] if GGUF_EMBED in file.tensors else 0
        spec = spec_from_gguf(file.fields, vocab_size=vocab, tied=tied_to is not None)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return spec, GgufSource(spec, file, tied_to or GGUF_EMBED)


def generation_from_gguf(fields: Mapping[str, Any], spec: ModelSpec) -> GenerationDefaults:
    """Stop ids and sampling defaults in GGUF metadata (``general.sampling.*``).

    A model with a chat template stops on both ``<|im_end|>`` and ``<|endoftext|>``.
    """
    ids = [fields.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    if fields.get("tokenizer.chat_template"):
        tokens = fields.get("tokenizer.ggml.tokens") or []
        ids += [tokens.index(token) for token in END_TOKENS if token in tokens]
    temperature = fields.get("general.sampling.temp")
    return GenerationDefaults(
        stop_token_ids=stop_ids(spec, [i for i in ids if isinstance(i, int)]),
        temperature=round(float(temperature), 6) if temperature else 0.0,
        top_p=round(float(fields.get("general.sampling.top_p", 1.0)), 6),
        top_k=int(fields.get("general.sampling.top_k", 0)),
        repetition_penalty=round(float(fields.get("general.sampling.penalty_repeat", 1.0)), 6),
    )


def _require_embedding(file: GgufFile) -> None:
    if GGUF_EMBED not in file.tensors or len(file.tensors[GGUF_EMBED].shape) != 2:
        raise WeightError(f"{file.path}: holds no {GGUF_EMBED} matrix; this is not a whole model")


def _tied_to(file: GgufFile) -> str | None:
    """Name of the tensor that is embedding and head at once, or None if they differ.

    Quantisers store a tied matrix twice in different types; the more precise copy is used.
    """
    embed, head = file.tensors.get(GGUF_EMBED), file.tensors.get(GGUF_HEAD)
    if head is None:
        return GGUF_EMBED
    if embed is None or embed.shape != head.shape:
        return None
    import numpy as np

    rows = np.unique(np.linspace(0, head.shape[0] - 1, _SAMPLE_ROWS).astype(np.int64))
    ours, theirs = _rows(file, GGUF_EMBED, rows), _rows(file, GGUF_HEAD, rows)
    distance = float(np.linalg.norm(ours - theirs))
    if distance > (_noise(embed) + _noise(head)) * float(np.linalg.norm(theirs)):
        return None
    return GGUF_HEAD if head.nbytes > embed.nbytes else GGUF_EMBED


def _noise(tensor: GgufTensor) -> float:
    bits = tensor.nbytes * 8 / prod(tensor.shape)
    return _NOISE[max((b for b in _NOISE if b <= bits), default=2)]


def _rows(file: GgufFile, name: str, rows: NDArray[np.int64]) -> NDArray[np.float32]:
    import numpy as np

    tensor = file.tensors[name]
    table = np.frombuffer(file.data(name), dtype=np.uint8).reshape(tensor.shape[0], -1)
    picked = np.ascontiguousarray(table[rows])
    if tensor.type.name in _DENSE:
        shape = (len(rows), tensor.shape[1])
        return HostTensor(_DENSE[tensor.type.name], shape, picked.reshape(-1).data).float32()
    return _dequantize(file.path, tensor, picked.reshape(-1).data)


def _dequantize(path: Path, tensor: GgufTensor, data: memoryview) -> NDArray[np.float32]:
    """Blocks to float32 ``[rows, width]``."""
    import numpy as np
    from gguf.quants import dequantize

    width = tensor.shape[-1]
    row_bytes = tensor.nbytes * width // prod(tensor.shape)
    blocks = np.frombuffer(data, dtype=np.uint8).reshape(-1, row_bytes)
    values = np.empty((len(blocks), width), dtype=np.float32)
    step = max(1, _CHUNK_ELEMENTS // width)
    for start in range(0, len(blocks), step):
        part = slice(start, start + step)
        try:
            values[part] = dequantize(blocks[part], tensor.type)
        except NotImplementedError as error:
            raise WeightError(
                f"{path}: block type {tensor.type.name} cannot be dequantised; use another "
                "quantisation of the model"
            ) from error
    return values
