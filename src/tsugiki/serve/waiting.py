"""Which request begins next: adapters take turns, and one that cannot have its turn yet is not passed over for ever."""
from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterator
from typing import Any, Protocol

PATIENCE = 32                                         # times that a request may be passed over


class Waits(Protocol):
    version: Hashable                                 # whose turn it takes
    passed: int


class Waiting:
    """Requests by adapter, each adapter's in the order they came.

    The adapter whose last turn is longest ago has the next. One that cannot begin now (no slot is free, it is being read) is
    passed over, PATIENCE times; then it is `aged`, and the caller makes room for it.
    """

    def __init__(self) -> None:
        self.queues: OrderedDict[Hashable, deque[Any]] = OrderedDict()      # in the order of their turns

    def __iter__(self) -> Iterator[Any]:
        return (row for queue in self.queues.values() for row in queue)

    def put(self, row: Waits) -> None:
        self.queues.setdefault(row.version, deque()).append(row)

    def drop(self, row: Waits) -> None:
        queue = self.queues[row.version]
        queue.remove(row)
        if not queue:
            del self.queues[row.version]

    def aged(self) -> Any | None:
        """The request that has waited too long, if any: of several, the one passed over most."""
        heads = [queue[0] for queue in self.queues.values()]
        return max((row for row in heads if row.passed >= PATIENCE), key=lambda row: row.passed, default=None)

    def take(self, begin: Callable[[Any], bool], skip: Hashable = ()) -> Any | None:
        """The next request, which `begin` accepted; None if none can begin. skip: an adapter whose turn it is not."""
        heads = [queue[0] for version, queue in self.queues.items() if version is not skip]
        for n, row in enumerate(heads):
            if begin(row):
                for other in heads[:n]:
                    other.passed += 1
                self.drop(row)
                if row.version in self.queues:
                    self.queues.move_to_end(row.version)
                return row
        return None
