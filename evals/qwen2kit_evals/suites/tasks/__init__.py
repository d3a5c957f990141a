"""Tasks that lm-eval lacks, as its YAML files, with their prompts and parsers."""
