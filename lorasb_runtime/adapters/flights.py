"""One flight for each key: whoever asks while it is in the air waits for its result."""

import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")

Submit = Callable[..., Any]


class Flights(Generic[K, T]):
    """Shares running work between threads; keeps nothing of it once it has ended.

    A flight that fails gives all who wait for it the same error.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._flights: dict[K, Future[T]] = {}

    def begin(self, key: K, work: Callable[[], T], submit: Submit) -> "Future[T]":
        """The key's flight; where there is none, `submit(function, ...)` sets one going."""
        with self._lock:
            flight = self._flights.get(key)
            if flight is not None:
                return flight
            flight = self._flights[key] = Future()
            flight.set_running_or_notify_cancel()  # one who waits cannot cancel it for the others
        try:
            submit(self._fly, key, flight, work)
        except RuntimeError as error:  # an executor that is shut down
            self._land(key, flight)
            flight.set_exception(error)
        return flight

    def run(self, key: K, work: Callable[[], T]) -> T:
        """The flight's result; the first to come does the work in its own thread."""
        return self.begin(key, work, lambda fly, *args: fly(*args)).result()

    def forget(self, key: K) -> None:
        """Let the next `begin` start anew; those who wait still get the old flight's result."""
        with self._lock:
            self._flights.pop(key, None)

    def _fly(self, key: K, flight: "Future[T]", work: Callable[[], T]) -> None:
        try:
            result = work()
        except BaseException as error:
            self._land(key, flight)
            flight.set_exception(error)
        else:
            self._land(key, flight)
            flight.set_result(result)

    def _land(self, key: K, flight: "Future[T]") -> None:
        with self._lock:
            if self._flights.get(key) is flight:
                del self._flights[key]
