"""How much the server takes, and from whom."""

import ipaddress
import re
from dataclasses import dataclass

from lumi.config import UserError, derived


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one server takes at most."""

    max_batch: int = 16  # choices that are generated at the same time
    max_queue: int = 64  # choices that wait for their turn; then 429
    max_choices: int = derived()  # of one request: n for each of its prompts; 16 where there is room
    max_tokens: int = 1024  # that one choice may generate
    max_body_bytes: int = 1 << 20
    request_seconds: float = 600.0
    cache_tokens: int | None = None  # of all choices that run; None: 1,024 for each of max_batch

    def __post_init__(self) -> None:
        room = self.max_batch + self.max_queue
        if self.max_choices is None:
            object.__setattr__(self, "max_choices", max(1, min(16, room)))
        for name in ("max_batch", "max_choices", "max_tokens", "max_body_bytes"):
            if getattr(self, name) < 1:
                raise UserError(name, "must be at least 1", got=getattr(self, name))
        if self.max_queue < 0:
            raise UserError("max_queue", "must be at least 0", got=self.max_queue)
        if not 0 < self.request_seconds < float("inf"):
            raise UserError("request_seconds", "must be above 0", got=self.request_seconds)
        if self.cache_tokens is not None and self.cache_tokens < 1:
            raise UserError("cache_tokens", "must be at least 1", got=self.cache_tokens)
        if self.max_choices > room:
            expectation = f"must be at most --max-batch and --max-queue together, {room}"
            raise UserError("max_choices", expectation, got=self.max_choices)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_key(host: str, api_key: str | None) -> None:
    """Raises UserError for an address that others reach without a key, and for a key that no client can send.

    The error does not show the key.
    """
    if api_key is not None and not re.fullmatch("[!-~]+", api_key):
        raise UserError(
            "the API key", "must be visible ASCII characters without spaces", got="others or none"
        )
    if not is_loopback(host) and api_key is None:
        raise UserError(
            "--host",
            "must be 127.0.0.1 where there is no key, because others would reach the model",
            got=host,
            remedy="set LUMI_API_KEY",
        )
