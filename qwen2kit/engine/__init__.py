"""Continuing many sequences at once: scheduling, prefix sharing, speculation; no framework."""
