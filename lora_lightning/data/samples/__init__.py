"""Rows as documents, prompts with completions, and chats."""
