"""The loss that ``qwen2kit convert`` reports when it quantises."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen2kit.cli.output import console, progress, show_notes
from qwen2kit.errors import ConfigError, Qwen2KitError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qwen2kit.parity.prompts import Prompt
    from qwen2kit.parity.quality import ModelQuality, QualityReport
    from qwen2kit.weights.checkpoint import Checkpoint


@dataclass(slots=True)
class Quality:
    """A measurement that was asked for, and its outcome.

    Attributes:
        source: the original.
        text: ``auto`` or a file.
        windows: its tokens.
        required: whether failing to measure is an error (the user asked) or a note.
        report: the outcome, once measured.
        failure: why it could not be measured.
    """

    source: Checkpoint
    text: str
    windows: Sequence[Prompt]
    required: bool
    report: QualityReport | None = field(default=None, init=False)
    failure: str = field(default="", init=False)

    @classmethod
    def asked(
        cls, source: Checkpoint, text: str | None, declined: bool, quantising: bool
    ) -> Quality | None:
        """What the options ask for; None if nothing. Reads the text, so that a wrong path is
        known before anything is converted.

        Raises:
            ConfigError: contradicting options, or a text that cannot be used.
        """
        from qwen2kit.parity.passages import AUTO, held_out

        if text is not None and declined:
            raise ConfigError("give either --report or --no-report, they contradict each other")
        if declined or (text is None and not quantising):
            return None
        windows = held_out(source.tokenizer(), text or AUTO, context=source.spec.context_length)
        return cls(source, text or AUTO, windows, required=text is not None)

    def measure(self, out: Path) -> dict[str, Any]:
        """Compare the conversion with its source; the result is also kept in its record.

        Raises:
            Qwen2KitError: it cannot be measured, and the user asked for it.
        """
        from qwen2kit.parity.quality import measure_quality
        from qwen2kit.weights.checkpoint import open_checkpoint
        from qwen2kit.weights.convert import amend_record

        try:
            with progress("measuring the loss") as step:
                self.report = measure_quality(
                    self.source, open_checkpoint(out), self.windows, text=self.text, progress=step
                )
            outcome = self.report.to_dict()
        except Qwen2KitError as error:
            if self.required:
                raise
            self.failure = str(error)
            outcome = {"not_measured": self.failure}
        amend_record(out, quality=outcome)
        return outcome

    def print(self) -> None:
        """The table, or why there is none."""
        from rich.table import Table

        if self.report is None:
            show_notes([f"loss not measured: {self.failure}"])
            return
        report = self.report
        text = "built-in passages" if report.text == "auto" else report.text
        table = Table(
            title=f"loss on {report.tokens} tokens of {text} ({report.backend}, {report.dtype})"
        )
        for heading in ("", "bits/weight", "size", "perplexity", "KL (nats)", "top-1"):
            table.add_column(heading)
        table.add_row("original", *_cells(report.original))
        table.add_row("converted", *_cells(report.converted))
        console().print(table)


def _cells(model: ModelQuality) -> list[str]:
    return [
        f"{model.bits_per_weight:.2f}", f"{model.bytes / 1e6:.1f} MB", f"{model.perplexity:.4g}",
        f"{model.kl:.2e}", f"{model.top1_agreement:.1%}",
    ]  # fmt: skip
