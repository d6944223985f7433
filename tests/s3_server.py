"""A bucket on a local S3 server (moto), which s3fs speaks to."""

import contextlib

import pytest


@contextlib.contextmanager
def bucket(monkeypatch):
    """The URL of an empty bucket."""
    reason = "needs moto[server] and s3fs"
    server = pytest.importorskip("moto.server", reason=reason)
    s3fs = pytest.importorskip("s3fs", reason=reason)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    running = server.ThreadedMotoServer(port=0)
    running.start()
    try:
        host, port = running.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        s3fs.S3FileSystem.clear_instance_cache()
        s3fs.S3FileSystem().mkdir("lumi-test")
        yield "s3://lumi-test"
    finally:
        s3fs.S3FileSystem.clear_instance_cache()
        running.stop()
