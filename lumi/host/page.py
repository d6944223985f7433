"""Pages of HTML that need nothing else: no scripts, pictures or requests. Templates escape all text."""

import os
from pathlib import Path

import jinja2

from lumi.host.storage import TEMPORARY_PREFIX


def template(file: Path) -> jinja2.Template:
    """A template, which extends `page.html.jinja`. A name that it uses and is not given is an error."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([file.parent, Path(__file__).parent]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(file.name)


def write_page(output: Path, page: str) -> None:
    """Write a page, whole or not at all. Raises OSError."""
    real = Path(os.path.realpath(output))  # a link stays one
    temporary = real.with_name(f"{TEMPORARY_PREFIX}page-{os.getpid()}")
    try:
        temporary.write_bytes(page.encode("utf-8", "replace"))
        os.replace(temporary, real)
    finally:
        temporary.unlink(missing_ok=True)


def is_page(file: Path, generator: str) -> bool:
    """Whether a command wrote this file, by how it begins. What people wrote is not replaced."""
    if not file.is_file():
        return False
    with open(file, "rb") as opened:
        head = opened.read(512)
    return head.startswith(b"<!DOCTYPE html>") and f'name="generator" content="{generator}"'.encode() in head
