"""Writing beside computing, in bounded memory."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

Task = Callable[[], None]


class Writer:
    """A thread that runs tasks in their order.

    Memory stays bounded because a task waits until few are ahead of it. After the first task that fails, none runs.

    Args:
        ahead: tasks that may wait while one runs, at least 1.

    Raises:
        ValueError: ``ahead`` is below 1.
    """

    def __init__(self, ahead: int = 1) -> None:
        if ahead < 1:
            raise ValueError(f"ahead is {ahead}, expected at least 1")
        self._tasks: queue.Queue[Task | None] = queue.Queue(ahead)
        self._error: BaseException | None = None
        # What a second Ctrl-C ends at once leaves no more behind than a kill.
        self._thread = threading.Thread(target=self._run, name="dsd-write", daemon=True)
        self._thread.start()

    def put(self, task: Task) -> None:
        """Waits until there is room.

        Raises:
            BaseException: what an earlier task raised; this one will not run.
        """
        self._raise()
        self._tasks.put(task)

    def close(self) -> None:
        """Waits for all tasks; a second call does nothing.

        Raises:
            BaseException: what a task raised.
        """
        if self._thread.is_alive():
            self._tasks.put(None)
            self._thread.join()
        self._raise()

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            if self._error is None:
                try:
                    task()
                except BaseException as error:
                    self._error = error
            # Else the rows of the last task stay in memory until the next one comes.
            del task

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error
