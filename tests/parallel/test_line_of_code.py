import gc
import re
import threading
import time
import weakref

from lumi.parallel.line_of_code import line_of_code


def test_it_names_our_code_the_innermost_call_and_other_threads():
    free, inside = threading.Event(), threading.Event()

    def loads():
        inside.set()
        free.wait(60)

    reader, lines = threading.get_ident(), []
    thread = threading.Thread(target=loads)
    thread.start()
    watcher = threading.Thread(
        target=lambda: (inside.wait(60), time.sleep(0.2), lines.append(line_of_code(reader)), free.set())
    )
    watcher.start()
    free.wait(60)
    thread.join()
    watcher.join()
    name = "test_it_names_our_code_the_innermost_call_and_other_threads"
    assert re.match(
        rf"test_line_of_code\.py:\d+ {name} > threading\.py:\d+ Condition\.wait, thread in ", lines[0]
    )
    assert re.search(rf"test_line_of_code\.py:\d+ {name}\.<locals>\.loads\b", lines[0])


def test_it_keeps_nothing_alive():
    """The variables of the loop go when the loop lets them go, not at the next garbage collection."""

    class Logits:
        pass

    def step():
        logits = Logits()
        watcher = threading.Thread(target=line_of_code, args=(threading.get_ident(),))
        watcher.start()
        watcher.join()
        return weakref.ref(logits)

    gc.disable()
    try:
        assert step()() is None
    finally:
        gc.enable()
