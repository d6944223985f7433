import queue
import threading

import pytest
from crafted_models import wanderer

from lumi.inference.engine import Engine
from lumi.inference.generation import SamplingConfig, filler_id, generate_ids
from lumi.inference.scheduler import Finish, Request, Scheduler


class Collector:
    """Starts an engine and gathers what comes of it."""

    def __init__(self, load):
        self.news, self.ready = queue.Queue(), queue.Queue()
        self.engine = Engine(load, self.ready.put, lambda news: [self.news.put(item) for item in news])
        self.engine.start()

    def finished(self, count):
        """Ids and end of the next `count` requests that end."""
        ids, ends = {}, {}
        while len(ends) < count:
            request, delta = self.news.get(timeout=60)
            ids.setdefault(request, []).extend(scored.token for scored in delta.tokens)
            if delta.finish:
                ends[request] = delta
        return {request: (ids[request], delta) for request, delta in ends.items()}


@pytest.fixture(scope="module")
def model(tokenizer):
    return wanderer(tokenizer)


@pytest.fixture
def collector(model, tokenizer):
    collector = Collector(lambda: Scheduler(model, tokenizer, max_batch=4, num_pages=64))
    yield collector
    collector.engine.close()


def request(prompt, count=20):
    sampling = SamplingConfig(max_new_tokens=count, temperature=0.0)
    return Request(prompt=prompt, sampling=sampling, stop_ids=frozenset())


def test_threads_submit_and_each_gets_its_own(collector, model, tokenizer):
    requests = [request([1, 270 + number]) for number in range(12)]
    threads = [threading.Thread(target=collector.engine.submit, args=(each,)) for each in requests]
    for thread in threads:
        thread.start()
    assert collector.ready.get(timeout=60) is None
    found = collector.finished(12)
    options = {"stop_ids": frozenset(), "pad_id": filler_id(tokenizer)}
    for each in requests:
        [alone] = generate_ids(model, [each.prompt], each.sampling, **options)
        assert found[each][0] == alone.ids
    assert collector.engine.scheduler.pages.num_held == 0


def test_nothing_comes_of_a_cancelled_request(collector):
    gone, stays = request([1, 270], 200), request([1, 280], 30)
    for each in (gone, stays):
        collector.engine.submit(each)
    collector.engine.cancel(gone)
    found = collector.finished(1)
    assert list(found) == [stays]
    assert not collector.engine.scheduler.running


def test_a_failure_ends_its_requests_and_not_the_engine(collector, capfd):
    assert collector.ready.get(timeout=60) is None
    scheduler = collector.engine.scheduler
    hidden = scheduler.cache.hidden

    def fail(batch):
        scheduler.cache.hidden = hidden
        raise RuntimeError("out of memory")

    scheduler.cache.hidden = fail
    broken, fine = request([1, 270]), request([1, 280])
    collector.engine.submit(broken)
    [(_, delta)] = collector.finished(1).values()
    assert (delta.finish, delta.error) == (Finish.ERROR, "out of memory")
    assert "out of memory" in capfd.readouterr().err  # a traceback for whoever runs the server
    collector.engine.submit(fine)
    assert collector.finished(1)[fine][1].finish is Finish.LENGTH


def test_an_error_while_loading_is_told():
    def load():
        raise ValueError("no model")

    collector = Collector(load)
    assert str(collector.ready.get(timeout=60)) == "no model"
    assert collector.engine.scheduler is None
    collector.engine.close()


def test_closing_ends_the_thread_in_the_middle_of_a_request(collector):
    collector.engine.submit(request([1, 270], 250))
    collector.news.get(timeout=60)
    collector.engine.close()
    assert not collector.engine._thread.is_alive()
