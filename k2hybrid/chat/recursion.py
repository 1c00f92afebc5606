"""How far references lead: over graphs of schemas, without recursion of our own."""

from __future__ import annotations

from collections.abc import Collection, Mapping

# Name → its own weight, and where its references lead.
Graph = Mapping[str, tuple[int, Collection[str]]]


class TooDeepError(Exception):
    """A reference leads back to where it is, with no end to it."""


def in_place_work(graph: Graph) -> dict[str, int]:
    """For each name its weight and, as often as they are referred to, those of its references.

    Raises:
        TooDeepError: a reference leads back to itself.
    """
    work: dict[str, int] = {}
    for component in _components(graph):
        name = component[0]
        if len(component) > 1 or name in graph[name][1]:
            raise TooDeepError
        weight, references = graph[name]
        work[name] = weight + sum(work[reference] for reference in references)
    return work


def heaviest(graph: Graph) -> int:
    """No path that goes nowhere twice weighs more; of a cycle all weights are counted."""
    reach: dict[str, int] = {}
    for component in _components(graph):
        inside = sum(graph[name][0] for name in component)
        beyond = max((reach.get(to, 0) for name in component for to in graph[name][1]), default=0)
        for name in component:
            reach[name] = inside + beyond
    return max(reach.values())


def _components(graph: Graph) -> list[list[str]]:
    """Names that lead to each other, together; each group after those it leads to (Tarjan's algorithm)."""
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    open_names: list[str] = []
    is_open: set[str] = set()
    result: list[list[str]] = []
    for start in graph:
        if start in order:
            continue
        path = [(start, iter(graph[start][1]))]
        order[start] = lowest[start] = len(order)
        open_names.append(start)
        is_open.add(start)
        while path:
            name, references = path[-1]
            for to in references:
                if to not in order:
                    order[to] = lowest[to] = len(order)
                    open_names.append(to)
                    is_open.add(to)
                    path.append((to, iter(graph[to][1])))
                    break
                if to in is_open:
                    lowest[name] = min(lowest[name], order[to])
            else:
                path.pop()
                if path:
                    above = path[-1][0]
                    lowest[above] = min(lowest[above], lowest[name])
                if lowest[name] == order[name]:
                    cut = open_names.index(name)
                    result.append(open_names[cut:])
                    is_open.difference_update(open_names[cut:])
                    del open_names[cut:]
    return result
