"""The OpenAI HTTP API for one model, and a chat page."""
