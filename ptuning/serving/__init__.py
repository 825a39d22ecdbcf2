"""Soft prompts behind an OpenAI-compatible API, on Ray Serve."""
