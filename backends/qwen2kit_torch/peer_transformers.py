"""transformers as a parity peer: its own loader, its own model, its own ``generate``."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from qwen2kit.backend.protocol import TokenIds
from qwen2kit.weights.checkpoint import Checkpoint

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class TransformersPeer:
    """Loads Hugging Face directories through ``AutoModelForCausalLM`` on the CPU."""

    name = "transformers"

    def refuses(self, checkpoint: Checkpoint, dtype: str) -> str:
        """Not installed, or not a Hugging Face directory."""
        if find_spec("torch") is None or find_spec("transformers") is None:
            return "not installed; pip install transformers 'qwen2kit[torch]'"
        if checkpoint.format != "hf":
            return (
                f"reads Hugging Face directories, not {checkpoint.format.upper()}; "
                "convert with: qwen2kit convert MODEL --to hf"
            )
        return ""

    def load(self, checkpoint: Checkpoint, dtype: str) -> LoadedTransformers:
        """Load the directory in ``dtype``, in evaluation mode."""
        return LoadedTransformers(checkpoint, dtype)


class LoadedTransformers:
    """A transformers model as a `Peer`."""

    name = "transformers"

    def __init__(self, checkpoint: Checkpoint, dtype: str) -> None:
        import torch

        transformers = import_module("transformers")
        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()
        self._model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            checkpoint.path, dtype=getattr(torch, dtype), local_files_only=True
        ).eval()
        self._generation = transformers.GenerationConfig

    def logits(self, tokens: TokenIds) -> NDArray[np.float32]:
        """``[T, vocab]`` float32."""
        import torch

        with torch.inference_mode():
            logits = self._model(torch.tensor([list(tokens)]), use_cache=False).logits[0]
        array: NDArray[np.float32] = logits.float().numpy()
        return array

    def greedy(self, tokens: TokenIds, count: int, stop: Sequence[int]) -> list[int]:
        """``generate`` without sampling, with no setting of the checkpoint but the stop ids."""
        import torch

        prompt = torch.tensor([list(tokens)])
        self._model.generation_config = self._generation(
            do_sample=False,
            max_new_tokens=count,
            eos_token_id=list(stop) or None,
            pad_token_id=stop[0] if stop else 0,
        )
        with torch.inference_mode():
            output = self._model.generate(prompt, attention_mask=torch.ones_like(prompt))
        return [int(token) for token in output[0, len(tokens) :]]

    def hidden_states(self, tokens: TokenIds) -> NDArray[np.float32]:
        """Caught by hooks: the last entry of ``output_hidden_states`` is already normalised."""
        import numpy as np
        import torch

        body = self._model.model
        caught: list[NDArray[np.float32]] = []

        def catch(module: object, inputs: object, output: Any) -> None:
            value = output[0] if isinstance(output, tuple) else output
            caught.append(value[0].float().numpy())

        modules = [body.embed_tokens, *body.layers, body.norm]
        handles = [module.register_forward_hook(catch) for module in modules]
        try:
            with torch.inference_mode():
                body(torch.tensor([list(tokens)]), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return np.stack(caught)
