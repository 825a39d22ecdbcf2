"""Versions of soft prompts: publishing, promotion, import, export."""
