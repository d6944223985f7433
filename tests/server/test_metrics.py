"""What /metrics says after requests that are known."""

import time

import httpx2
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families
from served import NAME, make_service, served, wait_until

from lumi.server.limits import Limits


def figures(server):
    """The values of all series by name and label."""
    answer = httpx2.get(f"{server.url}/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    found = {}
    for family in text_string_to_metric_families(answer.text):
        assert family.documentation
        for sample in family.samples:
            found[" ".join([sample.name, *sample.labels.values()])] = sample.value
    return found


def test_requests_and_tokens_are_counted(model, tokenizer):
    with served(make_service(model, tokenizer, Limits(max_batch=3), num_pages=20)) as server:
        wait_until(server.is_ready)
        before = figures(server)
        assert {name: before[name] for name in ("lumi_cache_pages", "lumi_cache_pages_held")} == {
            "lumi_cache_pages": 20,
            "lumi_cache_pages_held": 0,
        }
        client = server.client()
        prompt = [tokenizer.bos_id, *range(20, 40)]
        client.completions.create(model=NAME, prompt=prompt, max_tokens=5, temperature=0)
        client.completions.create(model=NAME, prompt=[prompt, prompt], max_tokens=2, n=2, temperature=0)
        wait_until(server.is_idle)
        after = figures(server)
        counts = {
            "lumi_requests_total finished": 2,
            "lumi_prompt_tokens_total": 63,
            "lumi_cached_prompt_tokens_total": 32,
            "lumi_generated_tokens_total": 13,
            "lumi_request_seconds_count": 2,
            "lumi_time_to_first_token_seconds_count": 2,
            "lumi_running": 0,
            "lumi_waiting": 0,
        }
        assert {name: after[name] for name in counts} == counts
        assert after["lumi_request_seconds_sum"] >= after["lumi_time_to_first_token_seconds_sum"] > 0


def test_a_failure_is_no_success(model, tokenizer, monkeypatch, capfd):
    with served(make_service(model, tokenizer)) as server, server.client() as client:
        wait_until(server.is_ready)

        def fails(batch):
            raise RuntimeError("broken")

        monkeypatch.setattr(server.scheduler.cache, "hidden", fails)
        with pytest.raises(openai.InternalServerError):
            client.completions.create(model=NAME, prompt="a")
        wait_until(server.is_idle)
        after = figures(server)
        assert after["lumi_requests_total ended early"] == 1
        assert "lumi_requests_total finished" not in after
        assert "broken" in capfd.readouterr().err


def test_the_gauges_show_what_runs_and_waits(model, tokenizer, monkeypatch):
    with served(make_service(model, tokenizer, Limits(max_batch=2))) as server, server.client() as client:
        wait_until(server.is_ready)
        step = server.scheduler.step
        monkeypatch.setattr(server.scheduler, "step", lambda: time.sleep(0.02) or step())
        with client.completions.create(
            model=NAME, prompt="a", max_tokens=200, n=5, stream=True, extra_body={"top_k": 3}
        ) as stream:
            next(iter(stream))
            during = figures(server)
        assert (during["lumi_running"], during["lumi_waiting"]) == (2, 3)
        assert during["lumi_cache_pages_held"] == 2 * -(-202 // 16)
        wait_until(server.is_idle)
        assert figures(server)["lumi_requests_total ended early"] == 1
