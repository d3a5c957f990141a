"""Running programs that a model wrote: one process each, cut off from everything else.

`run.Sandbox` runs a program; `probe.strongest_sandbox` finds out by trying what this machine can
isolate. What runs inside (`launch` and what it imports) needs the standard library only.
"""
