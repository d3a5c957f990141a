"""Open answers graded by a language model: MT-Bench, Arena-Hard and AlignBench style.

The judge is any server with OpenAI's chat-completions interface. The grading prompts are worded
here, so scores compare with each other but not with those benchmarks' published ones.
"""
