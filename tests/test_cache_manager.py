import pytest
from microvllm.engine.cache_manager import KVCacheManager

B = 4
TEXT = list(range(40))


def cache_with(text=TEXT, num_blocks=16, **options) -> KVCacheManager:
    """A cache in which the text has been computed and freed."""
    cache = KVCacheManager(num_blocks, B, **options)
    computed(cache, 0, text)
    cache.free(0)
    return cache


def computed(cache: KVCacheManager, seq_id: int, text: list[int]) -> int | None:
    cached = cache.alloc(seq_id, text)
    if cached is not None:
        cache.commit(seq_id, text, len(text))
    cache.check()
    return cached


# --- prefixes ---


@pytest.mark.parametrize("n", [1, B - 1, B, B + 1, 3 * B - 1, 3 * B, 3 * B + 1, len(TEXT)])
def test_a_hit_is_all_full_blocks_short_of_the_last_token(n):
    assert cache_with().alloc(1, TEXT[:n]) == (n - 1) // B * B


@pytest.mark.parametrize("n", [B - 1, B, B + 1, 2 * B - 1, 2 * B, 2 * B + 1])
def test_only_full_blocks_of_what_is_computed_are_shared(n):
    cache = KVCacheManager(32, B)
    cache.alloc(0, TEXT)
    cache.commit(0, TEXT, n)
    assert cache.alloc(1, TEXT) == n // B * B
    cache.check()


def test_a_hit_ends_where_the_texts_differ():
    assert cache_with().alloc(1, [*TEXT[:9], 99, *TEXT[10:]]) == 8


@pytest.mark.parametrize("hash_function", [hash, lambda key: 0])
def test_equal_blocks_after_different_beginnings_are_not_shared(hash_function):
    cache = cache_with([0] * B + [1] * B, hash_function=hash_function)
    assert cache.alloc(1, [1] * B + [9]) == 0
    assert cache.alloc(2, [0] * (2 * B) + [9]) == B


def test_a_hit_takes_the_very_blocks():
    cache = KVCacheManager(16, B)
    computed(cache, 0, TEXT[:10])
    cache.alloc(1, TEXT[:9])
    assert cache.block_table(1)[:2] == cache.block_table(0)[:2]
    assert cache.block_table(1)[2] != cache.block_table(0)[2]
    assert cache.num_used == 4


def test_without_reuse_or_prefix_caching_nothing_is_shared():
    assert cache_with().alloc(1, TEXT, reuse=False) == 0
    cache = cache_with(prefix_caching=False)
    assert cache.alloc(1, TEXT) == 0
    cache.check()


def test_equal_hashes_do_not_pass_for_equal_texts():
    cache = cache_with(num_blocks=32, hash_function=lambda key: 0)
    assert cache.alloc(1, TEXT[::-1]) == 0
    cache.free(1)
    assert cache.alloc(2, TEXT) == 36
    cache.check()


def test_a_block_computed_twice_at_the_same_time_is_cached_once():
    cache, text = KVCacheManager(8, B), TEXT[: 2 * B]
    for seq_id in (0, 1):
        assert cache.alloc(seq_id, text) == 0
    first, second = (list(cache.block_table(seq_id)) for seq_id in (0, 1))
    for seq_id in (0, 1):
        cache.commit(seq_id, text, len(text))
        cache.check()
    assert not set(first) & set(second)
    cache.free(0)
    cache.free(1)
    cache.check()
    assert cache.alloc(2, [*text, 99]) == 2 * B
    assert cache.block_table(2)[:2] == first


def test_what_follows_a_duplicate_block_is_found_through_the_cached_one():
    cache = KVCacheManager(8, B)
    cache.alloc(0, TEXT[:B])
    cache.alloc(1, TEXT[: 2 * B])
    cache.commit(0, TEXT[:B], B)
    cache.commit(1, TEXT[: 2 * B], 2 * B)
    assert cache.alloc(2, TEXT[: 2 * B + 1]) == 2 * B
    assert cache.block_table(2)[:2] == [cache.block_table(0)[0], cache.block_table(1)[1]]
    cache.check()


# --- eviction ---


@pytest.mark.parametrize("taken, left", [(1, 3), (2, 2), (3, 1), (4, 0)])
def test_the_end_of_a_text_is_evicted_before_its_beginning(taken, left):
    text = TEXT[: 3 * B]
    cache = cache_with(text, num_blocks=4)
    cache.alloc(1, [99] * (taken * B), reuse=False)
    cache.free(1)
    assert cache.alloc(2, [*text, 99]) == left * B
    cache.check()


def test_the_longest_unused_text_is_evicted_first():
    cache = KVCacheManager(3, B)
    for i in range(3):
        computed(cache, i, [i] * B)
        cache.free(i)
    assert cache.alloc(3, [0] * B + [9]) == B  # the first is in use again, so the second goes for its last token
    cache.free(3)
    assert cache.alloc(4, [1] * B + [9]) == 0  # takes the free block and the third
    cache.free(4)
    assert cache.alloc(5, [0] * B + [9]) == B


def test_free_blocks_go_before_cached_ones():
    cache = cache_with(TEXT[: 2 * B], num_blocks=4)
    cache.alloc(1, [99] * (2 * B))
    assert cache.alloc(2, TEXT[: 2 * B]) == B
    cache.check()


def test_a_shared_block_survives_the_free_of_one_owner():
    cache = KVCacheManager(4, B)
    computed(cache, 0, TEXT[:9])
    computed(cache, 1, TEXT[:9])
    shared = cache.block_table(1)[:2]
    cache.free(0)
    cache.check()
    assert cache.num_available == 1
    assert cache.alloc(2, [99] * B) == 0
    assert not set(cache.block_table(2)) & set(shared)
    assert cache.alloc(3, [99]) is None
    assert cache.block_table(1)[:2] == shared


def test_reviving_cached_blocks_leaves_fewer_to_take():
    cache = cache_with(TEXT[: 3 * B], num_blocks=4)
    assert cache.alloc(1, TEXT[: 3 * B] + [99] * B + [99]) is None  # 3 revived and 2 new are one too many
    assert cache.alloc(1, [*TEXT[: 3 * B], 99]) == 3 * B
    assert cache.num_available == 0


# --- what is available ---


def test_alloc_takes_all_or_nothing():
    cache = KVCacheManager(3, B)
    assert cache.alloc(0, TEXT[: 3 * B + 1]) is None
    assert cache.alloc(0, TEXT[: 2 * B + 1], leave_free=1) is None
    assert cache.num_available == 3
    assert cache.alloc(0, TEXT[: 2 * B], leave_free=1) == 0
    assert cache.num_available == 1
    cache.check()


def test_where_no_block_is_left_no_prefix_is_looked_for():
    """A request that waits for a block asks in every step, and its prompt may be long."""
    hashed = []
    cache = KVCacheManager(3, B, hash_function=lambda key: hashed.append(key) or 0)
    cache.alloc(0, [0] * B)
    cache.commit(0, [0] * B, B)
    hashed.clear()
    assert cache.alloc(1, [0] * (B + 1), leave_free=2) is None and not hashed
    assert cache.alloc(1, [0] * (B + 1), leave_free=1) == B and hashed


def test_append_gives_one_block_more_as_long_as_there_is_one():
    cache = KVCacheManager(2, B)
    cache.alloc(0, TEXT[:B])
    assert cache.append(0) and cache.num_used == 2
    assert not cache.append(0) and cache.num_used == 2
    assert len(cache.block_table(0)) == 2
    cache.check()


def test_append_evicts_a_cached_block_where_none_is_free():
    cache = cache_with(TEXT[:B], num_blocks=2)
    cache.alloc(1, [99] * B)
    assert cache.append(1)
    assert cache.alloc(2, [0]) is None
    cache.check()


# --- check() itself can fail ---


def free_twice(cache):
    cache._free.append(cache._free[0])


def miscount_users(cache):
    cache._users[cache.block_table(0)[0]] += 1


def free_a_block_in_use(cache):
    cache._free.append(cache.block_table(0)[0])


def lose_a_block(cache):
    cache._free.pop()


def have_a_block_twice(cache):
    table = cache.block_table(0)
    table[1] = table[0]


def evictable_but_not_cached(cache):
    cache._evictable[cache._free.pop()] = None


def free_but_cached(cache):
    block = next(iter(cache._evictable))
    del cache._evictable[block]
    cache._free.append(block)


def forget_in_the_index(cache):
    next(iter(cache._index.values())).pop()


def index_twice(cache):
    blocks = next(iter(cache._index.values()))
    blocks.append(blocks[0])


def leave_an_empty_entry(cache):
    cache._index[12345] = []


@pytest.mark.parametrize(
    "corrupt, message",
    [
        (free_twice, "free twice"),
        (miscount_users, "miscounted"),
        (free_a_block_in_use, "2 states"),
        (lose_a_block, "0 states"),
        (have_a_block_twice, "a block twice"),
        (evictable_but_not_cached, "evictable block is not cached"),
        (free_but_cached, "free block is cached"),
        (forget_in_the_index, "index and the cached blocks differ"),
        (index_twice, "index and the cached blocks differ"),
        (leave_an_empty_entry, "empty entries"),
    ],
)
def test_check_sees_a_corrupted_book(corrupt, message):
    cache = cache_with(TEXT[: 2 * B], num_blocks=8)
    computed(cache, 0, [50, 51, 52, 53, 54])
    corrupt(cache)
    with pytest.raises(AssertionError, match=message):
        cache.check()
