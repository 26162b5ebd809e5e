"""Whose turn it is: fair queueing of the jobs' steps by their tokens and weights, a function of the accounts alone."""
from __future__ import annotations

from collections.abc import Mapping


class Turns:
    """An account a job: the tokens it had, divided by its weight. Those with the smallest go first.

    A tick takes jobs in that order as long as their steps fit into the budget together, the first one always (its step may be
    larger than the budget). Nobody is passed over: a job waits at most until those before it have overtaken its account, so a
    step of c tokens at weight w waits no more than

        sum over the other jobs k of (1 + (c / w + S) w_k / c_k) ticks, S the largest c / w of all jobs,

    and of two jobs that have to wait, the tokens divided by their weights differ by no more than 2 S. A job takes one step a tick
    at most: what it could not use of its share is kept up to S, and no more, so it never becomes a claim on the others. When all
    fit, nobody waits, and the accounts are level again.
    """

    def __init__(self, accounts: Mapping[str, float] | None = None):
        self.accounts: dict[str, float] = dict(accounts or {})

    def choose(self, costs: Mapping[str, int], budget: int) -> list[str]:
        """Who steps now, of the jobs with a step of so many tokens to take (in the order they were added)."""
        level = min((self.accounts[name] for name in costs if name in self.accounts), default=0.0)
        for name in costs:                            # a new one is treated as the one that has waited longest
            self.accounts.setdefault(name, level)
        chosen, used = [], 0
        order = list(costs)
        for name in sorted(costs, key=lambda name: (self.accounts[name], order.index(name))):
            if chosen and used + costs[name] > budget:
                break
            chosen.append(name)
            used += costs[name]
        return sorted(chosen, key=order.index)

    def charge(self, costs: Mapping[str, int], chosen: list[str], weights: Mapping[str, float]) -> None:
        """The chosen ones' steps are taken."""
        if len(chosen) == len(costs):
            for name in costs:
                self.accounts[name] = 0.0
            return
        most = max(costs[name] / weights[name] for name in costs)
        least = min(self.accounts[name] for name in costs if name not in chosen) - most
        for name in chosen:
            self.accounts[name] = max(self.accounts[name] + costs[name] / weights[name], least)

    def forget(self, name: str) -> None:
        self.accounts.pop(name, None)
