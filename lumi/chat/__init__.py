"""Conversations: messages, chat templates, and the rendering into (token ids, loss mask)."""
