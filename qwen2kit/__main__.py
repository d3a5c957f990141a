"""``python -m qwen2kit``."""

from qwen2kit.cli.app import main

main()
