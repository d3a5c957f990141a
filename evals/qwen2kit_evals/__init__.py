"""Evaluation of any backend through lm-eval (https://github.com/EleutherAI/lm-evaluation-harness).

`harness.Qwen2KitLM` is the one adapter; `run.evaluate` the one way to run it. lm-eval finds no
third-party models by itself, so its own command line is reached with ``python -m qwen2kit_evals``.
"""
