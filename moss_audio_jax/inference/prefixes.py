"""What was read of clips, kept for further questions about them."""

import collections

from moss_audio_jax.inference.slots import ReadPrompts


class Prefixes:
    """Read prompts by key, of `limit` bytes together at most: the least recently used is dropped first."""

    def __init__(self, limit: int):
        self._limit, self.nbytes = limit, 0
        self._kept: collections.OrderedDict[bytes, ReadPrompts] = collections.OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: bytes) -> ReadPrompts | None:
        if key in self._kept:
            self._kept.move_to_end(key)
        return self._kept.get(key)

    def put(self, key: bytes, read: ReadPrompts) -> None:
        """Keeps a read prompt that is not kept yet, unless it is larger than the limit."""
        if read.nbytes > self._limit:
            return
        self._kept[key] = read
        self.nbytes += read.nbytes
        while self.nbytes > self._limit:
            self.nbytes -= self._kept.popitem(last=False)[1].nbytes
