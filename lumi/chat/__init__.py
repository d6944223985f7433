"""Conversations: messages, templates, and a conversation -> (token ids, loss mask)."""
