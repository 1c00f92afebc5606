"""The prefix tree: exact matches, sharing, least-recently-used eviction, reference counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from hypothesis import given, settings
from hypothesis import strategies as st

from k2hybrid.cache.prefix import PrefixTree


class Counts:
    """References on pages; `new` makes a page that its caller holds."""

    def __init__(self) -> None:
        self.counts: Counter[int] = Counter()
        self.made = 0

    def new(self, n: int) -> list[int]:
        pages = list(range(self.made, self.made + n))
        self.made += n
        self.counts.update(pages)
        return pages

    def retain(self, pages: Iterable[int]) -> None:
        self.counts.update(pages)

    def release(self, pages: Iterable[int]) -> None:
        for page in pages:
            self.counts[page] -= 1
            assert self.counts[page] >= 0

    def refcount(self, page: int) -> int:
        return self.counts[page]


def make() -> tuple[PrefixTree, Counts]:
    counts = Counts()
    return PrefixTree(counts, 2), counts


def test_match_finds_the_longest_prefix_of_full_pages() -> None:
    tree, counts = make()
    assert tree.match([1, 2, 3, 4]) == ([], 0)
    pages = counts.new(3)
    assert tree.insert([1, 2, 3, 4, 5, 6], pages) == pages
    assert tree.match([1, 2, 3, 4, 5, 6, 7]) == (pages, 6)
    assert tree.match([1, 2, 3, 4, 5]) == (pages[:2], 4)
    assert tree.match([1, 2, 3, 9]) == (pages[:1], 2)
    assert tree.match([1]) == ([], 0)
    # The same tokens at another place are another prefix.
    assert tree.match([3, 4, 5, 6]) == ([], 0)


def test_a_known_prefix_keeps_the_trees_page() -> None:
    tree, counts = make()
    first = counts.new(2)
    tree.insert([1, 2, 3, 4], first)
    second = counts.new(3)
    assert tree.insert([1, 2, 3, 4, 5, 6], second) == [*first, second[2]]
    assert counts.counts[first[0]] == 2
    assert counts.counts[second[0]] == 1  # not taken
    assert len(tree) == 3
    assert second[2] in tree
    assert second[0] not in tree


def test_partly_filled_pages_are_not_inserted() -> None:
    tree, counts = make()
    pages = counts.new(2)
    assert tree.insert([1, 2, 3], pages) == pages[:1]
    assert counts.counts[pages[1]] == 1


def test_eviction_is_least_recently_used_and_leaves_first() -> None:
    tree, counts = make()
    old, new = counts.new(2), counts.new(2)
    tree.insert([1, 1, 2, 2], old)
    tree.insert([5, 5, 6, 6], new)
    counts.release([*old, *new])
    tree.match([1, 1, 2, 2])  # now `new` is the older one
    assert tree.evict(1) == 1
    assert tree.match([5, 5, 6, 6]) == ([new[0]], 2)
    tree.match([1, 1, 2, 2])
    assert tree.evict(3) == 3
    assert len(tree) == 0
    assert not +counts.counts


def test_held_pages_are_never_evicted() -> None:
    tree, counts = make()
    pages = counts.new(3)
    tree.insert([1, 1, 2, 2, 3, 3], pages)
    counts.release(pages[2:])  # the caller still holds the first two
    assert tree.evict(9) == 1
    assert tree.match([1, 1, 2, 2, 3, 3]) == (pages[:2], 4)
    counts.release(pages[:2])
    assert tree.evict(9) == 2


def test_clear_releases_everything() -> None:
    tree, counts = make()
    pages = counts.new(2)
    tree.insert([1, 1, 2, 2], pages)
    counts.release(pages)
    tree.clear()
    assert not +counts.counts
    assert tree.match([1, 1]) == ([], 0)


def test_candidates_for_eviction_do_not_pile_up() -> None:
    tree, counts = make()
    pages = counts.new(1)
    for _ in range(1000):
        tree.insert([1, 1], pages)
        tree.match([1, 1])
    assert len(tree._leaves) == 1


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.booleans(), st.lists(st.integers(0, 1), max_size=12), st.integers(0, 5)), max_size=40
    )
)
def test_against_a_dictionary_of_prefixes(steps: list[tuple[bool, list[int], int]]) -> None:
    tree, counts = make()
    known: dict[tuple[int, ...], int] = {}
    for insert, ids, n in steps:
        if insert:
            pages = counts.new(len(ids) // 2)
            kept = tree.insert(ids, pages)
            for i, page in enumerate(kept):
                assert known.setdefault(tuple(ids[: 2 * i + 2]), page) == page
            counts.release(pages)
        else:
            before = len(known)
            freed = tree.evict(n)
            assert freed == min(n, before)  # nobody else holds any
            known = {prefix: page for prefix, page in known.items() if page in tree}
            assert len(known) == before - freed
        # Every prefix of a known prefix is known, and matches say exactly what the dictionary says.
        assert all(prefix[:-2] in known for prefix in known if len(prefix) > 2)
        best = [known[tuple(ids[:i])] for i in range(2, len(ids) + 1, 2) if tuple(ids[:i]) in known]
        assert tree.match(ids)[0] == best
        assert all(counts.counts[page] == 1 for page in known.values())
        assert sum((+counts.counts).values()) == len(known)
