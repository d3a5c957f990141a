"""``python -m qwen2kit``."""

from qwen2kit.cli.app import main
from qwen2kit.launch.lifeline import follow_parent

follow_parent()
main()
