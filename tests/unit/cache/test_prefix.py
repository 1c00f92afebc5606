"""The prefix tree: matches exact to the token, sharing, scopes, leases, eviction, reference counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k2hybrid.cache.page_keys import page_keys
from k2hybrid.cache.prefix import Evicted, Match, Partial, PrefixTree, _Node
from k2hybrid.errors import EngineError


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


def make(page_tokens: int = 2) -> tuple[PrefixTree, Counts]:
    counts = Counts()
    return PrefixTree(counts, page_tokens), counts


def put(tree: PrefixTree, counts: Counts, ids: list[int], scope: str = "") -> list[int]:
    """Insert fresh pages that nobody else holds afterwards."""
    pages = counts.new(-(-len(ids) // tree._page_tokens))
    kept = tree.insert(ids, pages, scope)
    counts.release(pages)
    return kept


# --- matches ------------------------------------------------------------------------------------------


def test_match_finds_the_longest_prefix_of_full_pages() -> None:
    tree, counts = make()
    assert tree.match([1, 2, 3, 4]) == Match([], 0)
    pages = counts.new(3)
    assert tree.insert([1, 2, 3, 4, 5, 6], pages) == pages
    assert tree.match([1, 2, 3, 4, 5, 6, 7]) == Match(pages, 6)
    assert tree.match([1, 2, 3, 4]) == Match(pages[:2], 4)
    assert tree.match([1, 2, 9, 9]) == Match(pages[:1], 2)
    assert tree.match([]) == Match([], 0)
    # The same tokens at another place are another prefix.
    assert tree.match([3, 4, 5, 6]) == Match([], 0)


def test_match_is_exact_to_the_token() -> None:
    tree, counts = make(4)
    pages = put(tree, counts, [1, 2, 3, 4, 5, 6, 7])
    assert tree.match([1, 2, 3, 4, 5, 6, 7, 8]) == Match(pages[:1], 7, Partial(pages[1], 3, whole=True))
    assert tree.match([1, 2, 3, 4, 5, 6, 7]) == Match(pages[:1], 7, Partial(pages[1], 3, whole=True))
    # Fewer ids, or others, than the node claims.
    assert tree.match([1, 2, 3, 4, 5, 6]) == Match(pages[:1], 6, Partial(pages[1], 2, whole=False))
    assert tree.match([1, 2, 3, 4, 5, 9, 9]) == Match(pages[:1], 5, Partial(pages[1], 1, whole=False))
    # A full page that agrees in its beginning only.
    assert tree.match([1, 2, 3, 9, 5]) == Match([], 3, Partial(pages[0], 3, whole=False))
    assert tree.match([1]) == Match([], 1, Partial(pages[0], 1, whole=False))
    assert tree.match([2]) == Match([], 0)


def test_the_child_with_most_in_common_is_chosen() -> None:
    tree, counts = make(4)
    one, other, third = (put(tree, counts, ids)[0] for ids in ([1, 2, 3, 4], [1, 2, 7, 8], [1, 9, 9]))
    assert tree.match([1, 2, 7, 9]).partial == Partial(other, 3, whole=False)
    assert tree.match([1, 2, 3, 9]).partial == Partial(one, 3, whole=False)
    assert tree.match([1, 9, 0, 0]).partial == Partial(third, 2, whole=False)
    assert tree.match([1, 9, 9, 9]).partial == Partial(third, 3, whole=True)


def test_of_equally_long_ones_that_which_ends_there_is_chosen() -> None:
    tree, counts = make(4)
    short = counts.new(1)
    tree.insert([1, 2], short)  # held, so that the next one does not replace it
    put(tree, counts, [1, 2, 0])
    put(tree, counts, [1, 2, 5])
    assert tree.match([1, 2, 3, 4]).partial == Partial(short[0], 2, whole=True)
    assert tree.match([1, 2, 9, 9]).partial == Partial(short[0], 2, whole=True)


def test_thousands_of_children_are_not_scanned(monkeypatch: pytest.MonkeyPatch) -> None:
    tree, counts = make(2)
    for token in range(3000):
        put(tree, counts, [7, 7, 7, token])
    looked_at = 0

    def chunk(node: _Node) -> tuple[int, ...]:
        nonlocal looked_at
        looked_at += 1
        return node.chunk

    monkeypatch.setattr("k2hybrid.cache.prefix._chunk", chunk)
    assert tree.match([7, 7, 7, 1234]).tokens == 4
    assert tree.match([7, 7, 7, 3001]).tokens == 3
    assert 0 < looked_at < 100


# --- insertion ----------------------------------------------------------------------------------------


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


def test_a_partly_filled_page_is_extended_by_who_goes_on_writing_it() -> None:
    tree, counts = make(4)
    pages = counts.new(2)
    for tokens in (1, 1, 3, 4, 5, 8):
        assert tree.insert(list(range(tokens)), pages[: -(-tokens // 4)]) == pages[: -(-tokens // 4)]
        assert tree.match(list(range(9))).tokens == tokens
    assert len(tree) == 2
    assert [tree.rows(page) for page in pages] == [4, 4]
    assert [counts.counts[page] for page in pages] == [2, 2]


def test_inserting_less_than_the_own_page_claims_changes_nothing() -> None:
    tree, counts = make(4)
    pages = counts.new(1)
    tree.insert([1, 2, 3], pages)
    assert tree.insert([1, 2], pages) == pages
    assert tree.rows(pages[0]) == 3


def test_a_partly_filled_page_that_is_known_elsewhere_stays_its_owners() -> None:
    tree, counts = make(4)
    known = put(tree, counts, [1, 2, 3])
    for ids in ([1, 2], [1, 2, 3]):
        own = counts.new(1)
        assert tree.insert(ids, own) == own
        assert own[0] not in tree
        assert counts.counts[own[0]] == 1
    assert tree.match([1, 2, 3, 4]) == Match([], 3, Partial(known[0], 3, whole=True))


def test_an_own_part_that_another_page_overtook_leaves_the_tree() -> None:
    tree, counts = make(4)
    own = counts.new(1)
    tree.insert([1, 2], own)
    longer = put(tree, counts, [1, 2, 3])
    assert len(tree) == 2  # `own` is held and may still go another way
    assert tree.insert([1, 2, 3], own) == own
    assert own[0] not in tree
    assert counts.counts[own[0]] == 1
    # Gone further it is entered again, and replaces the other.
    assert longer[0] in tree
    assert tree.insert([1, 2, 3, 9], own) == own
    assert list(tree.pages()) == own


def test_an_own_part_leaves_the_tree_when_its_full_page_is_known_elsewhere() -> None:
    tree, counts = make(4)
    own = counts.new(2)
    tree.insert([1, 2], own[:1])
    full = put(tree, counts, [1, 2, 3, 4])
    assert tree.insert([1, 2, 3, 4, 5], own) == [full[0], own[1]]
    assert counts.counts[own[0]] == 1
    assert sorted(tree.pages()) == sorted([full[0], own[1]])


def test_dead_parts_do_not_pile_up() -> None:
    tree, counts = make(8)
    put(tree, counts, [1, 2])
    other = put(tree, counts, [1, 3])
    for tokens in range(3, 9):
        put(tree, counts, list(range(1, tokens + 1)))
        assert len(tree) == 2
    assert sum((+counts.counts).values()) == 2
    assert tree.match([1, 3]).partial == Partial(other[0], 2, whole=True)


def test_all_beginnings_are_found_among_others() -> None:
    tree, counts = make(8)
    held = [counts.new(1) for _ in range(3)]
    for pages, ids in zip(held, ([1], [1, 2], [1, 2, 3, 4]), strict=True):
        tree.insert(ids, pages)
    others = [
        put(tree, counts, ids)[0] for ids in ([1, 1, 5], [1, 2, 1, 5], [1, 2, 3, 3, 9], [1, 2, 3, 4, 4])
    ]
    for pages in held:
        counts.release(pages)
    longest = put(tree, counts, [1, 2, 3, 4, 5])
    assert sorted(tree.pages()) == sorted([*others, *longest])


def test_a_replaced_part_hands_on_its_lease() -> None:
    tree, counts = make(4)
    put(tree, counts, [1, 2])
    tree.lease([1, 2], 50.0)
    put(tree, counts, [5, 5])
    put(tree, counts, [1, 2, 3])
    assert tree.evict(1, now=10.0) == 1
    assert tree.match([1, 2, 3]).tokens == 3
    assert tree.broken_leases == 0


def test_wrong_insertions_are_errors_and_leave_the_tree_usable() -> None:
    tree, counts = make(4)
    pages = counts.new(2)
    with pytest.raises(EngineError, match="do not fill"):
        tree.insert([1, 2, 3, 4, 5], pages[:1])
    tree.insert([1, 2, 3], pages[:1])
    for ids, scope in (([1, 2, 9], ""), ([1, 2, 3, 9], "other"), ([9], "")):
        with pytest.raises(EngineError, match="other tokens"):
            tree.insert(ids, pages[:1], scope)
    with pytest.raises(EngineError, match="other tokens"):
        tree.insert([5, 5, 5, 5, 1, 2, 3], [pages[1], pages[0]])
    assert list(tree._roots) == [""]
    counts.release(pages)
    assert tree.evict(9) == 2
    assert not tree._roots
    assert tree.insert([], []) == []


# --- scopes -------------------------------------------------------------------------------------------


def test_scopes_share_nothing() -> None:
    tree, counts = make()
    one = put(tree, counts, [1, 2, 3], "one")
    assert tree.match([1, 2, 3]) == Match([], 0)
    assert tree.match([1, 2, 3], "other") == Match([], 0)
    assert tree.lease([1, 2, 3], 9.0, "other") == 0
    other = put(tree, counts, [1, 2, 3], "other")
    assert not {*one} & {*other}
    assert tree.match([1, 2, 3], "one") == Match(one[:1], 3, Partial(one[1], 1, whole=True))
    assert tree.match([1, 2, 3], "other") == Match(other[:1], 3, Partial(other[1], 1, whole=True))
    assert len(tree) == 4


def test_eviction_goes_over_all_scopes_and_removes_empty_ones() -> None:
    tree, counts = make()
    for scope in ("a", "b", "c"):
        put(tree, counts, [1, 2], scope)
    tree.match([1, 2], "a")
    assert tree.evict(2) == 2
    assert list(tree._roots) == ["a"]
    assert tree.evict(2) == 1
    assert not tree._roots
    tree.match([1, 2], "a")
    assert not tree._roots


# --- leases -------------------------------------------------------------------------------------------


def test_leased_pages_go_last_and_those_first_whose_lease_ends_first() -> None:
    tree, counts = make()
    for ids in ([1, 1, 2], [3, 3], [4, 4], [5, 5]):
        put(tree, counts, ids)
    assert tree.lease([1, 1, 2, 9], 30.0) == 3
    assert tree.lease([3, 3], 20.0) == 2
    tree.lease([4, 4], 25.0)
    assert tree.evict(1, now=10.0) == 1
    assert tree.match([5, 5]).tokens == 0
    assert tree.broken_leases == 0
    assert tree.evict(2, now=10.0) == 2
    assert tree.broken_leases == 2
    assert (tree.match([3, 3]).tokens, tree.match([4, 4]).tokens) == (0, 0)
    assert tree.match([1, 1, 2]).tokens == 3
    assert tree.evict(9, now=10.0) == 2
    assert tree.broken_leases == 4


def test_the_longest_lease_counts() -> None:
    tree, counts = make()
    put(tree, counts, [1, 1])
    put(tree, counts, [2, 2])
    tree.lease([1, 1], 30.0)
    tree.lease([1, 1], 10.0)
    tree.lease([2, 2], 20.0)
    tree.evict(1, now=15.0)
    assert tree.match([1, 1]).tokens == 2


def test_an_expired_lease_is_none() -> None:
    tree, counts = make()
    put(tree, counts, [1, 1])
    put(tree, counts, [2, 2])
    tree.lease([1, 1], 20.0)
    tree.match([2, 2])
    assert tree.evict(0, now=10.0) == 0
    assert tree.evict(1, now=20.0) == 1
    assert tree.match([1, 1]).tokens == 0
    assert tree.match([2, 2]).tokens == 2
    assert tree.broken_leases == 0


def test_a_lease_covers_the_path_but_not_what_comes_behind() -> None:
    tree, counts = make()
    put(tree, counts, [1, 1, 2, 2, 3, 3])
    tree.lease([1, 1, 2, 9], 20.0)
    assert tree.evict(1, now=1.0) == 1
    assert tree.match([1, 1, 2, 2, 3, 3]).tokens == 4
    assert tree.broken_leases == 0
    assert tree.evict(1, now=1.0) == 1
    assert tree.broken_leases == 1


def test_an_extended_part_keeps_its_lease() -> None:
    tree, counts = make(4)
    pages = counts.new(1)
    tree.insert([1, 2], pages)
    tree.lease([1, 2], 20.0)
    tree.insert([1, 2, 3], pages)
    counts.release(pages)
    put(tree, counts, [5])
    assert tree.evict(1, now=1.0) == 1
    assert tree.match([1, 2, 3]).tokens == 3


# --- eviction -----------------------------------------------------------------------------------------


def test_eviction_is_least_recently_used_and_leaves_first() -> None:
    tree, counts = make()
    old, new = put(tree, counts, [1, 1, 2, 2]), put(tree, counts, [5, 5, 6, 6])
    tree.match([1, 1, 2, 2])  # now `new` is the older one
    assert tree.evict(1) == 1
    assert tree.match([5, 5, 6, 6]) == Match(new[:1], 2)
    assert tree.match([1, 1, 2, 2]) == Match(old, 4)
    assert tree.evict(3) == 3
    assert len(tree) == 0
    assert not +counts.counts


def test_held_pages_are_never_evicted() -> None:
    tree, counts = make()
    pages = counts.new(3)
    tree.insert([1, 1, 2, 2, 3, 3], pages)
    counts.release(pages[2:])  # the caller still holds the first two
    assert tree.evict(9) == 1
    assert tree.match([1, 1, 2, 2, 3, 3]) == Match(pages[:2], 4)
    counts.release(pages[:2])
    assert tree.evict(9) == 2


def test_a_page_held_without_its_path_leaves_the_tree_in_the_last_resort() -> None:
    tree, counts = make()
    pages = put(tree, counts, [1, 1, 2, 2, 3, 3, 4, 4])
    other = put(tree, counts, [5, 5])
    counts.retain(pages[2:])
    assert tree.evict(1) == 1
    assert other[0] not in tree
    assert tree.match([1, 1, 2, 2, 3, 3, 4, 4]).pages == pages
    assert tree.evict(9) == 2
    assert len(tree) == 0
    assert [counts.counts[page] for page in pages] == [0, 0, 1, 1]


def test_clear_releases_everything() -> None:
    tree, counts = make()
    put(tree, counts, [1, 1, 2, 2])
    put(tree, counts, [1], "other")
    tree.clear()
    assert not +counts.counts
    assert tree.match([1, 1]) == Match([], 0)


def test_candidates_for_eviction_do_not_pile_up() -> None:
    tree, counts = make()
    pages = counts.new(1)
    for _ in range(1000):
        tree.insert([1, 1], pages)
        tree.match([1, 1])
        tree.lease([1, 1], 9.0)
    assert len(tree._leaves) == 1
    # Nor do those of nodes that were replaced.
    for i in range(1000):
        put(tree, counts, [5, i])
        tree.lease([5, i], 9.0)
        tree.evict(1, now=10.0)
        put(tree, counts, [6])
        put(tree, counts, [6, 6])
        tree.evict(1)
    assert len(tree._leaves) + len(tree._leased) < 50


# --- against a dictionary -----------------------------------------------------------------------------

STEPS = st.lists(
    st.tuples(
        st.sampled_from(["insert", "evict", "lease"]),
        st.lists(st.integers(0, 1), max_size=10),
        st.integers(0, 5),
        st.sampled_from(["", "x"]),
    ),
    max_size=40,
)


@settings(max_examples=150, deadline=None)
@given(STEPS)
def test_against_a_dictionary_of_prefixes(steps: list[tuple[str, list[int], int, str]]) -> None:
    size = 3
    tree, counts = make(size)
    written: dict[int, tuple[str, list[int]]] = {}  # page → scope and prefix up to its last row
    for what, ids, n, scope in steps:
        if what == "insert":
            pages = counts.new(-(-len(ids) // size))
            for i, (page, kept) in enumerate(zip(pages, tree.insert(ids, pages, scope), strict=True)):
                prefix = ids[: (i + 1) * size]
                known_scope, known = written.setdefault(kept, (scope, prefix))
                assert (known_scope, known[: len(prefix)]) == (scope, prefix)
                assert kept == page or len(prefix) % size == 0
            counts.release(pages)
        elif what == "evict":
            before = len(tree)
            assert tree.evict(n, now=2.0) == min(n, before)  # nobody else holds any
            assert len(tree) == before - min(n, before)
        else:
            tree.lease(ids, float(n), scope)
        # What is in the tree says which tokens are reusable; no part is the beginning of another.
        claims = {(written[page][0], tuple(written[page][1])) for page in tree.pages()}
        known_prefixes = {(s, claim[:i]) for s, claim in claims for i in range(len(claim) + 1)}
        assert len(claims) == len(tree)
        for s, part in claims:
            if len(part) % size:
                end = -(-len(part) // size) * size
                assert not any(
                    s == t and other != part and other[: len(part)] == part and len(other) <= end
                    for t, other in claims
                )
        longest = max(i for i in range(len(ids) + 1) if i == 0 or (scope, tuple(ids[:i])) in known_prefixes)
        match = tree.match(ids, scope)
        assert match.tokens == longest
        assert len(match.pages) == longest // size
        used = [*match.pages, *([match.partial.page] if match.partial else [])]
        for i, page in enumerate(used):
            assert written[page][1][: (i + 1) * size][:longest] == ids[: min((i + 1) * size, longest)]
        if match.partial:
            assert match.partial.rows == longest % size
            assert match.partial.whole == (tree.rows(match.partial.page) == longest % size)
        assert all(counts.counts[page] == 1 for page in tree.pages())
        assert sum((+counts.counts).values()) == len(tree)


# --- what leaves ---------------------------------------------------------------------------------------


def evictions(keeps: Callable[[Evicted], bool]) -> tuple[PrefixTree, Counts, list[Evicted]]:
    told: list[Evicted] = []

    def leaving(gone: Evicted, _now: float) -> bool:
        told.append(gone)
        return keeps(gone)

    counts = Counts()
    return PrefixTree(counts, 4, leaving), counts, told


def test_who_asks_is_told_of_each_page_by_its_key() -> None:
    tree, counts, told = evictions(lambda gone: True)
    ids = [1, 2, 3, 4, 5, 6, 7, 8, 9]
    pages = counts.new(3)
    tree.insert(ids, pages, "s")
    counts.release(pages)
    tree.lease(ids[:4], 50.0, "s")
    assert tree.evict(3, now=10.0) == 3
    keys = page_keys("s", ids, 4)
    assert [(gone.key, gone.parent) for gone in told] == [(key.key, key.parent) for key in reversed(keys)]
    assert [gone.ids for gone in told] == [(9,), (5, 6, 7, 8), (1, 2, 3, 4)]
    assert [gone.page for gone in told] == pages[::-1]
    assert [gone.until for gone in told] == [float("-inf"), float("-inf"), 50.0]
    assert tree.broken_leases == 0  # its latents are kept elsewhere


def test_a_lost_lease_is_a_broken_one() -> None:
    tree, counts, _ = evictions(lambda gone: False)
    pages = counts.new(1)
    tree.insert([1, 2], pages)
    counts.release(pages)
    tree.lease([1, 2], 50.0)
    assert tree.evict(1, now=10.0) == 1
    assert tree.broken_leases == 1


def test_pages_that_nobody_keeps_stay_while_they_may() -> None:
    tree, counts, told = evictions(lambda gone: gone.ids != (3,))
    for token in (1, 2, 3, 4):
        pages = counts.new(1)
        tree.insert([token], pages)
        counts.release(pages)
    assert tree.evict(4, only_kept=True) == 2
    assert [tree.match([token]).tokens for token in (1, 2, 3, 4)] == [0, 0, 1, 1]
    assert tree.evict(4) == 2
    assert len(told) == 5


def test_a_page_that_was_extended_after_it_was_told_of_has_another_key() -> None:
    keeps = [False, True]
    tree, counts, told = evictions(lambda gone: keeps.pop(0))
    pages = counts.new(1)
    tree.insert([1, 2], pages)
    counts.release(pages)
    assert tree.evict(1, only_kept=True) == 0
    tree.insert([1, 2, 3], pages)
    assert tree.evict(1) == 1
    assert [gone.key for gone in told] == [page_keys("", ids, 4)[0].key for ids in ([1, 2], [1, 2, 3])]


def test_a_page_of_another_scope_is_refused() -> None:
    counts = Counts()
    tree = PrefixTree(counts, 2)
    pages = counts.new(2)
    tree.insert([1, 2, 3, 4], pages, "one")
    with pytest.raises(EngineError, match="other tokens"):
        tree.insert([1, 2, 3, 4], pages, "other")
    assert tree.match([1, 2, 3, 4], "other").tokens == 0


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 1), min_size=1, max_size=9), st.integers(1, 3), st.integers(0, 2)),
        min_size=4,
        max_size=24,
    )
)
def test_what_is_known_of_a_history_may_be_skipped(steps: list[tuple[list[int], int, int]]) -> None:
    """Histories that grow by turns, and evictions: as if each were compared from its beginning."""

    class Whole(PrefixTree):
        def _known(self, root: Any, ids: Sequence[int], pages: Sequence[int]) -> tuple[_Node, int]:
            return root, 0

    made = []
    for kind in (PrefixTree, Whole):
        counts = Counts()
        tree = kind(counts, 2)
        seen: list[Any] = []
        for ids, turns, evicted in steps:
            history: list[int] = []
            held: list[int] = []
            for turn in range(turns):
                history = [*history, *ids, turn]
                held += counts.new(-(-len(history) // 2) - len(held))
                kept = tree.insert(history, held)
                counts.retain(kept)
                counts.release(held)
                held = kept
                seen.append(kept)
            counts.release(held)
            seen.append((tree.evict(evicted), sorted(tree.pages())))
        made.append(seen)
    assert made[0] == made[1]
