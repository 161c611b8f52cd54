"""Blocks of a cache as their owner counts them: taken as texts grow, shared by texts that begin alike, taken back.

A block that is full of tokens is known by a digest of all tokens up to its end. Texts with the same beginning have the
same digests, and share the blocks. A block that no text uses any more is kept for the next text that begins like this,
until it is needed: the one that was not used for longest goes first.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

#: Tokens of a block.
BLOCK_SIZE = 32


def digests(tokens: Sequence[int], size: int, salt: str = "", known: Sequence[bytes] = ()) -> list[bytes]:
    """A digest for every full block of a text, of all tokens up to its end; `known` are those of its first blocks.

    `salt` distinguishes texts of which the same tokens mean other keys and values.
    """
    found = list(known)
    for start in range(len(found) * size, len(tokens) - size + 1, size):
        before = found[-1] if found else salt.encode()
        block = np.asarray(tokens[start : start + size], np.int32).tobytes()
        found.append(hashlib.blake2b(before + block, digest_size=16).digest())
    return found


class BlockPool:
    """The blocks of one device, or of the devices that share its rows.

    Args:
        count: blocks, of which the first is never given away: it represents none.
    """

    def __init__(self, count: int):
        self.count = count
        self._free = list(range(count - 1, 0, -1))
        self._users = [0] * count
        self._digests: dict[int, bytes] = {}
        self._blocks: dict[bytes, int] = {}
        self._kept: OrderedDict[int, None] = OrderedDict()  # without users, but known; the next to go first

    @property
    def available(self) -> int:
        """Blocks that no text uses."""
        return len(self._free) + len(self._kept)

    @property
    def known(self) -> int:
        """Blocks that are kept for texts to come."""
        return len(self._kept)

    def take(self) -> int | None:
        """A block for a text; None where all are in use."""
        if self._free:
            block = self._free.pop()
        elif self._kept:
            block, _ = self._kept.popitem(last=False)
            self._forget(block)
        else:
            return None
        self._users[block] = 1
        return block

    def release(self, blocks: Sequence[int]) -> None:
        """Takes blocks back from a text. Of several, those at its end go first when blocks are needed."""
        for block in reversed(blocks):
            self._users[block] -= 1
            if self._users[block]:
                continue
            if block in self._digests:
                self._kept[block] = None
            else:
                self._free.append(block)

    def matching(self, prefixes: Sequence[bytes]) -> list[int]:
        """The blocks of the longest known beginning of a text with these digests."""
        found: list[int] = []
        for digest in prefixes:
            if digest not in self._blocks:
                break
            found.append(self._blocks[digest])
        return found

    def share(self, blocks: Sequence[int]) -> None:
        """Gives blocks that are known to one more text."""
        for block in blocks:
            self._users[block] += 1
            self._kept.pop(block, None)

    def remember(self, block: int, digest: bytes) -> None:
        """Makes a block known, which is full now; of two with the same tokens, the first stays known."""
        if digest not in self._blocks and block not in self._digests:
            self._blocks[digest], self._digests[block] = block, digest

    def unusable(self, blocks: Sequence[int]) -> list[int]:
        """Makes a text's blocks unknown; those that no other text uses."""
        for block in blocks:
            self._forget(block)
        return [block for block in blocks if self._users[block] == 1]

    def _forget(self, block: int) -> None:
        digest = self._digests.pop(block, None)
        if digest is not None:
            del self._blocks[digest]


class StateCopies:
    """Where copies of the states of a few texts are, by the digest of their tokens; the one unused for longest goes.

    Args:
        count: rows for copies.
    """

    def __init__(self, count: int):
        self._free = list(range(count - 1, -1, -1))
        self._rows: OrderedDict[bytes, int] = OrderedDict()

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._rows

    def row(self, digest: bytes) -> int:
        """Where a copy is."""
        self._rows.move_to_end(digest)
        return self._rows[digest]

    def place(self, digest: bytes) -> int | None:
        """Where to put a copy; None where there is one of this text, or no row."""
        if digest in self._rows or not (self._free or self._rows):
            return None
        row = self._free.pop() if self._free else self._rows.popitem(last=False)[1]
        self._rows[digest] = row
        return row
