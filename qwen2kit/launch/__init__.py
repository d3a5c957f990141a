"""Part of qwen2kit."""
