"""lm-eval's own command line with the model ``qwen2kit`` registered.

    python -m qwen2kit_evals run --model qwen2kit \\
        --model_args pretrained=DIR,backend=mlx,dtype=float32,batch_size=8 --tasks gsm8k

lm-eval 0.4 imports only models it ships, hence this entry. Everything is lm-eval's, but for two
options of ours: ``--datasets DIR`` reads data in Hub layout from disk, without network, and
``--allow-code-execution`` runs the programs of code tasks in our sandbox.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from qwen2kit.cli.output import fail
from qwen2kit.errors import Qwen2KitError
from qwen2kit_evals.code_eval import CONSENT, CodeEval, code_execution
from qwen2kit_evals.sandbox.probe import strongest_sandbox


def main(arguments: Sequence[str] | None = None) -> None:
    """Run lm-eval's command line; our errors become one line and a non-zero exit."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--datasets")
    own.add_argument(CONSENT, action="store_true", dest="programs")
    options, rest = own.parse_known_args(arguments)
    try:
        from lm_eval.__main__ import cli_evaluate

        import qwen2kit_evals.harness  # noqa: F401 (importing it registers the model)
        from qwen2kit_evals.local_data import LocalData, local_datasets

        data = LocalData(options.datasets) if options.datasets else None
        code = CodeEval(strongest_sandbox()) if options.programs else None
        sys.argv = ["lm-eval", *rest, *(["--confirm_run_unsafe_code"] if code else [])]
        with local_datasets(data), code_execution(code):
            cli_evaluate()
    except Qwen2KitError as error:
        fail(str(error), error.exit_code)


if __name__ == "__main__":
    main()
