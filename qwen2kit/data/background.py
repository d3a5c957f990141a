"""Work ahead in a thread: the items of an iterator, and the batches of a loader."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from queue import Empty, Full, Queue
from threading import Event, Thread, current_thread
from typing import Generic, TypeVar

from qwen2kit.backend.values import TokenBatch
from qwen2kit.data.loader import Batches
from qwen2kit.data.row_source import State

T = TypeVar("T")
_POLL_SECONDS = 0.1
_JOIN_SECONDS = 10.0


class Closed(Exception):
    """Asked for an item after `Background.close`."""


class _Raised:
    def __init__(self, error: BaseException) -> None:
        self.error = error


class Background(Iterator[T], Generic[T]):
    """The items of ``items``, made by a thread that stays up to ``ahead`` items in front.

    What the iterator raises is raised here, in its turn. The thread ends with the items, with
    `close`, when this object is forgotten, and when the interpreter exits.
    """

    def __init__(self, items: Iterator[T], ahead: int) -> None:
        self._queue: Queue[T | _Raised] = Queue(ahead)
        self._stop = Event()
        thread = Thread(target=_work, args=(items, self._queue, self._stop), daemon=True)
        thread.start()
        self._thread = thread
        self._end = weakref.finalize(self, _finish, self._stop, thread)

    def __next__(self) -> T:
        """The next item. Raises what the iterator raised, StopIteration included."""
        item = self._get()
        if isinstance(item, _Raised):
            if self._queue.empty():
                self._queue.put(item)  # for whoever asks again
            raise item.error
        return item

    def close(self) -> None:
        """Stop the thread and wait for it."""
        self._end()

    def _get(self) -> T | _Raised:
        while not self._stop.is_set():
            try:
                return self._queue.get(timeout=_POLL_SECONDS)
            except Empty:
                continue
        return _Raised(Closed())


def _work(items: Iterator[T], queue: Queue[T | _Raised], stop: Event) -> None:
    while not stop.is_set():
        item: T | _Raised
        try:
            item = next(items)
        except BaseException as error:
            item = _Raised(error)
        while not stop.is_set():
            try:
                queue.put(item, timeout=_POLL_SECONDS)
                break
            except Full:
                continue
        if isinstance(item, _Raised):
            return


def _finish(stop: Event, thread: Thread) -> None:
    stop.set()
    if thread is not current_thread():
        thread.join(_JOIN_SECONDS)


class Prefetched:
    """A loader whose batches are made while the model computes.

    `state` tells what has been handed out, not what has been made.
    """

    def __init__(self, loader: Batches, ahead: int = 2) -> None:
        self._loader = loader
        self._ahead = ahead
        self._state = loader.state()
        self._batches: Background[tuple[TokenBatch, State]] | None = None

    def next_batch(self) -> TokenBatch:
        if self._batches is None:
            self._batches = Background(_made(self._loader), self._ahead)
        batch, self._state = next(self._batches)
        return batch

    def state(self) -> State:
        return self._state

    def restore(self, state: State) -> None:
        self._rest()
        self._loader.restore(state)
        self._state = state

    def rows_in(self, epoch: int) -> int:
        return self._loader.rows_in(epoch)

    def fingerprint(self) -> str:
        return self._loader.fingerprint()

    def close(self) -> None:
        self._loader.close()  # first: the thread may be waiting for what that stops
        self._rest()

    def __enter__(self) -> Prefetched:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _rest(self) -> None:
        if self._batches is not None:
            self._batches.close()
            self._batches = None


def _made(loader: Batches) -> Iterator[tuple[TokenBatch, State]]:
    while True:
        yield loader.next_batch(), loader.state()
