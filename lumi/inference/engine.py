"""A scheduler on a thread of its own, which alone touches the model. Any thread may submit and cancel."""

import queue
import sys
import threading
import traceback
from collections.abc import Callable, Sequence

from lumi.config import UserError
from lumi.inference.scheduler import Delta, Request, Scheduler

News = Sequence[tuple[Request, Delta]]


class Engine:
    """Loads a model and runs requests until it is closed.

    Args:
        load: makes the scheduler, in the engine's thread.
        on_ready: called there when the model is loaded, or could not be: then with the error.
        on_news: called there after each step with what is new.

    Attributes:
        scheduler: None until the model is loaded. Other threads may only look at it.
    """

    def __init__(
        self,
        load: Callable[[], Scheduler],
        on_ready: Callable[[BaseException | None], None],
        on_news: Callable[[News], None],
    ):
        self._load, self._on_ready, self._on_news = load, on_ready, on_news
        self._inbox: queue.SimpleQueue[tuple[str, Request | None]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="lumi-engine", daemon=True)
        self.scheduler: Scheduler | None = None

    def start(self) -> None:
        """Begin to load."""
        self._thread.start()

    def submit(self, request: Request) -> None:
        """Add a request, whose prompt `Scheduler.limit` has accepted."""
        self._inbox.put(("add", request))

    def cancel(self, request: Request) -> None:
        """End a request before the next step. Nothing more comes of it."""
        self._inbox.put(("cancel", request))

    def close(self) -> None:
        """End the thread after the current step, and wait for it unless it still loads. Unfinished requests
        are dropped."""
        self._inbox.put(("close", None))
        if self.scheduler is not None:
            self._thread.join()

    def _run(self) -> None:
        try:
            self.scheduler = scheduler = self._load()
        except BaseException as error:  # whoever waits for the model is told, whatever it is
            self._on_ready(error)
            return
        self._on_ready(None)
        while self._take_orders(scheduler):
            try:
                news: News = scheduler.step()
            except Exception as error:  # the next request may go well: a server does not end with one
                if not isinstance(error, UserError):
                    traceback.print_exc(file=sys.stderr)
                news = scheduler.fail(str(error))
            if news:
                self._on_news(news)

    def _take_orders(self, scheduler: Scheduler) -> bool:
        """Take what came. Waits for it if there is nothing to do. False: the engine is closed."""
        while True:
            try:
                order, request = self._inbox.get(block=not scheduler.has_work)
            except queue.Empty:
                return True
            if request is None:
                return False
            (scheduler.add if order == "add" else scheduler.cancel)(request)
