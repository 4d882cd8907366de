"""The block allocator of the paged KV cache, with prefix reuse (arXiv:2309.06180, sections 4.2 to 4.4)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

ROOT = 0
"""The prefix of no tokens."""


@dataclass(frozen=True)
class _CachedBlock:
    """What a block holds: the tokens themselves, so that equal hashes cannot pass for equal texts.

    prefix, parent: numbers, never used twice, of the text up to this block's end and up to its beginning
    """

    prefix: int
    parent: int
    tokens: tuple[int, ...]
    key: int


class KVCacheManager:
    """Decides which block holds which tokens of which sequence. Plain Python: it never sees the cache itself.

    A block is in exactly one state: free; in use, by one sequence or by several that share a prefix; or evictable: no
    sequence uses it, its tokens may come again, and it is given away when no free block is left, the longest unused
    one first.

    num_blocks:      blocks of the cache
    block_size:      tokens a block
    prefix_caching:  whether full blocks outlive their sequence and are shared
    hash_function:   of (prefix number, tokens); a bad one costs time, never correctness
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        prefix_caching: bool = True,
        hash_function: Callable[[tuple], int] = hash,
    ):
        assert num_blocks > 0 and block_size > 0
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self._hash = hash_function
        self._free = list(range(num_blocks - 1, -1, -1))
        self._evictable: dict[int, None] = {}  # ordered: the longest unused first
        self._users = [0] * num_blocks
        self._tables: dict[int, list[int]] = {}
        self._prefixes: dict[int, list[int]] = {}  # of a sequence: the prefix numbers of its full, committed blocks
        self._cached: dict[int, _CachedBlock] = {}
        self._index: dict[int, list[int]] = {}  # hash to the cached blocks that have it
        self._last_prefix = ROOT

    # --- what the scheduler asks for ---

    def alloc(self, seq_id: int, token_ids: Sequence[int], *, reuse: bool = True, leave_free: int = 0) -> int | None:
        """Gives a sequence blocks for all its tokens, cached ones first.

        reuse:       False computes the whole prompt anew
        leave_free:  blocks that must still be available afterwards
        → tokens whose keys and values are there already, always short of the last token, whose logits are wanted;
        None, and nothing is taken, where too few blocks are available
        """
        assert seq_id not in self._tables, f"sequence {seq_id} has blocks already"
        if leave_free >= self.num_available:  # a sequence takes a block at least: no prefix need be looked for
            return None
        shared = self._longest_prefix(token_ids) if reuse and self.prefix_caching else []
        new = self.blocks_for(len(token_ids)) - len(shared)
        revived = sum(block in self._evictable for block in shared)
        if new + leave_free > self.num_available - revived:
            return None
        for block in shared:
            self._evictable.pop(block, None)
            self._users[block] += 1
        self._tables[seq_id] = shared + [self._take() for _ in range(new)]
        self._prefixes[seq_id] = [self._cached[block].prefix for block in shared]
        return len(shared) * self.block_size

    def append(self, seq_id: int) -> bool:
        """Gives a sequence one more block, its others being full; False where none is available."""
        if not self.num_available:
            return False
        self._tables[seq_id].append(self._take())
        return True

    def commit(self, seq_id: int, token_ids: Sequence[int], num_computed: int) -> None:
        """Makes the blocks that `num_computed` tokens fill known to `alloc`, now that the cache holds them."""
        if not self.prefix_caching:
            return
        prefixes, size = self._prefixes[seq_id], self.block_size
        for i in range(len(prefixes), num_computed // size):
            parent = prefixes[-1] if prefixes else ROOT
            tokens = tuple(token_ids[i * size : (i + 1) * size])
            key = self._hash((parent, tokens))
            twin = self._find(key, parent, tokens)
            if twin is None:
                twin = self._tables[seq_id][i]
                self._last_prefix += 1
                self._cached[twin] = _CachedBlock(self._last_prefix, parent, tokens, key)
                self._index.setdefault(key, []).append(twin)
            prefixes.append(self._cached[twin].prefix)

    def free(self, seq_id: int) -> None:
        """Takes a sequence's blocks back; those that other sequences use stay theirs, full ones stay cached."""
        # The end of a text goes first: a prefix serves more texts than what follows it.
        for block in reversed(self._tables.pop(seq_id)):
            self._users[block] -= 1
            if self._users[block] == 0:
                if block in self._cached:
                    self._evictable[block] = None
                else:
                    self._free.append(block)
        del self._prefixes[seq_id]

    # --- what can be asked of it ---

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def block_table(self, seq_id: int) -> list[int]:
        """The sequence's blocks in order; not to be changed."""
        return self._tables[seq_id]

    @property
    def num_available(self) -> int:
        """Blocks that no sequence uses."""
        return len(self._free) + len(self._evictable)

    @property
    def num_used(self) -> int:
        """Blocks that sequences use, a shared one counted once."""
        return self.num_blocks - self.num_available

    def evictable_blocks(self) -> list[int]:
        """Cached blocks that no sequence uses, the longest unused first."""
        return list(self._evictable)

    def check(self) -> None:
        """Proves that every block has exactly one state and that the books agree; AssertionError says what does not."""
        users = [0] * self.num_blocks
        for seq_id, table in self._tables.items():
            assert len(set(table)) == len(table), f"sequence {seq_id} has a block twice: {table}"
            for block in table:
                users[block] += 1
        assert users == self._users, "users of blocks are miscounted"
        free, evictable = set(self._free), set(self._evictable)
        assert len(free) == len(self._free), "a block is free twice"
        for block in range(self.num_blocks):
            states = (block in free) + (block in evictable) + (users[block] > 0)
            assert states == 1, f"block {block} has {states} states"
        assert not free & self._cached.keys(), "a free block is cached"
        assert evictable <= self._cached.keys(), "an evictable block is not cached"
        indexed = [block for blocks in self._index.values() for block in blocks]
        assert sorted(indexed) == sorted(self._cached), "the index and the cached blocks differ"
        assert all(self._index.values()), "the index keeps empty entries"

    # --- its own steps ---

    def _longest_prefix(self, token_ids: Sequence[int]) -> list[int]:
        """The cached blocks that begin the text, without its last token."""
        blocks, parent, size = [], ROOT, self.block_size
        for start in range(0, len(token_ids) - size, size):
            tokens = tuple(token_ids[start : start + size])
            block = self._find(self._hash((parent, tokens)), parent, tokens)
            if block is None:
                break
            blocks.append(block)
            parent = self._cached[block].prefix
        return blocks

    def _find(self, key: int, parent: int, tokens: tuple[int, ...]) -> int | None:
        for block in self._index.get(key, ()):
            cached = self._cached[block]
            if cached.parent == parent and cached.tokens == tokens:
                return block
        return None

    def _take(self) -> int:
        """A block for one user: a free one, else the longest unused cached one."""
        if self._free:
            block = self._free.pop()
        else:
            block = next(iter(self._evictable))
            del self._evictable[block]
            cached = self._cached.pop(block)
            self._index[cached.key].remove(block)
            if not self._index[cached.key]:
                del self._index[cached.key]
        self._users[block] = 1
        return block
