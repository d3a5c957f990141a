"""Serving a model over HTTP with OpenAI's API: one engine thread behind an asyncio server."""
