"""Pages of which only a part lies near the compute: blocks come from below when they are looked at.

    near     staging   pages that are being filled, all layers in one frame
             cache     blocks that were looked at, by layer, the least recently used goes first
    below    every page that is full (``block_store.py``)

A page gets a staging frame when its first token comes and gives it up once it is full and the step is over: then all of
its layers go down, each with the landmark's key behind it, as a page travels. What is sent to another worker goes down
layer by layer, as each is final, and is sent from there; what arrives is written there, and nothing of it comes near
before it is looked at or, a page that is not full, written to.

What a step looks at is either staged or fetched, layer by layer; a layer that sees more blocks than the cache holds
sees them in turns. While a layer computes, the blocks that the next one saw in the step before are fetched ahead.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from memory.block_store import BlockStore, put_blocks
from memory.landmark_keys import make_landmark_table
from memory.layout import MIN_CACHE, KVLayout
from memory.pages import PageAllocator, PagePool


class TieredPages(PageAllocator):
    """Pages for landmark attention, whose tokens look at few blocks at a time.

    Args:
        layout: of a page.
        num_staging: pages that are being filled at one time, at most.
        num_cached: blocks of each layer that stay near, at least ``MIN_CACHE``.
        store: where full pages go.
        device: near the compute.

    Not thread-safe, but for its own thread that fetches ahead.
    """

    def __init__(
        self,
        layout: KVLayout,
        *,
        num_staging: int,
        num_cached: int,
        store: BlockStore,
        device: torch.device | str = "cpu",
    ) -> None:
        num_pages = store.pool.num_pages
        super().__init__(layout, num_pages)
        assert num_cached >= MIN_CACHE
        self.near = PagePool(layout, num_staging + num_cached, device=device)
        self.landmark_keys = make_landmark_table(layout, num_pages, self.near.storage.device)
        self.below = store.pool  # where transports find pages, and put them
        self.num_cached = num_cached
        self._store = store
        self._free = list(range(num_pages - 1, -1, -1))
        self._free_frames = list(range(num_staging))
        self._staged_P = torch.full((num_pages,), -1, dtype=torch.int64)  # frame of each page that is being filled
        self._filled: list[int] = []
        self._final: set[int] = set()  # pages with a frame that lie below already, all layers
        self._num_staging = num_staging
        self._cached = [_LayerCache(num_pages, num_cached) for _ in range(layout.num_layers)]
        self._seen: list[torch.Tensor] = []  # by the layer that computes
        self._last_seen: list[torch.Tensor | None] = [None] * layout.num_layers
        self._ahead: Future[None] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="blocks")
        self.num_fetched = self.num_hits = 0  # blocks that were looked at and not near, or near

    @property
    def num_free(self) -> int:
        return len(self._free)

    def begin_step(self, pages: Sequence[int], *, begun: Sequence[int], filled: Sequence[int]) -> None:
        """Pages that the step writes to get frames; the ones that the step before has filled go down.

        Args:
            pages: once each.
            begun: those among them whose first token comes.
            filled: those among them that are full afterwards.
        """
        self._wait()
        self._send_down()
        fresh = [page for page in pages if self._staged_P[page] < 0]
        self._stage(fresh)
        for page in set(fresh).difference(begun):  # it arrived
            self._bring(page)
        self._filled = list(filled)

    def staged(self, pages: torch.Tensor) -> torch.Tensor:
        """Frames of pages that are being filled, -1 of others; int64 of any shape, on the CPU."""
        return self._staged_P[pages]

    def look_at(self, layer_idx: int, pages_B: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        """Parts of ``pages_B``, none of which is there twice, each with the frames that hold its blocks until the next.

        Args:
            layer_idx: whose blocks.
            pages_B: int64, on the CPU.
        """
        self._wait()
        self._seen.append(pages_B)
        for start in range(0, len(pages_B), self.num_cached):
            part = slice(start, min(start + self.num_cached, len(pages_B)))
            frames = self._staged_P[pages_B[part]].clone()
            below = frames < 0
            frames[below] = self._fetch(layer_idx, pages_B[part][below])
            yield part, frames

    def end_layer(self, layer_idx: int) -> None:
        """The layer has seen all that it looks at; fetch what the next one saw last."""
        self._last_seen[layer_idx] = torch.cat(self._seen).unique()
        self._seen.clear()
        following = (layer_idx + 1) % self.layout.num_layers
        expected = self._last_seen[following]
        if expected is not None and len(expected):
            self._ahead = self._thread.submit(self._fetch_ahead, following, expected[: self.num_cached // 2])

    def copy_page(self, source: int, target: int) -> None:
        self._wait()
        if self._staged_P[source] < 0:  # it arrived
            self._stage([source])
            self._bring(source)
        if self._staged_P[target] < 0:
            self._stage([target])
        self.near.copy_page(int(self._staged_P[source]), int(self._staged_P[target]))

    def note_final(self, layer_idx: int, pages: Sequence[int]) -> None:
        pages_P = torch.tensor(pages)
        pages_P = pages_P[self._staged_P[pages_P] >= 0]
        self._lower(layer_idx, pages_P)
        if layer_idx == self.layout.num_layers - 1:
            self._final.update(pages_P.tolist())

    def note_arrived(self, pages: Sequence[int], num_full: int) -> None:
        self._wait()
        self._forget(pages)  # a page of this number that was fetched ahead after it was free
        full = torch.tensor(pages[:num_full], dtype=torch.int64)
        device = self.near.storage.device
        for layer_idx, keys_PKD in enumerate(self.below.landmarks):
            self.landmark_keys.write(layer_idx, full.to(device), keys_PKD[full].to(device))
        self.below.note_use(len(pages) * self.layout.page_bytes)

    def read_page(self, page: int) -> torch.Tensor:
        """A copy of a full page as it lies below, uint8 ``[num_layers, block_bytes]`` on the CPU, wherever it is."""
        frame = int(self._staged_P[page])
        if frame < 0:
            self.below.note_use(self.layout.page_bytes)
            return self.below.read_page(page)
        page_1 = torch.tensor([page], device=self.near.storage.device)
        for layer_idx in range(self.layout.num_layers):
            self.near.landmarks[layer_idx, frame] = self.landmark_keys.read(layer_idx, page_1)[0]
        return self.near.read_page(frame)

    def write_page(self, page: int, content_LX: torch.Tensor) -> None:
        """Fill a page, which is held and has nothing yet, as if it had arrived whole."""
        self.below.write_page(page, content_LX)
        self.note_arrived([page], 1)

    def _take(self, num_pages: int, beside: Sequence[int]) -> list[int]:
        return [self._free.pop() for _ in range(num_pages)]

    def _give_back(self, pages: list[int]) -> None:
        self._wait()
        self._filled = [page for page in self._filled if page not in set(pages)]
        self._final.difference_update(pages)
        self._unstage([page for page in pages if self._staged_P[page] >= 0])
        self._forget(pages)
        self._free.extend(pages)

    def _stage(self, pages: Sequence[int]) -> None:
        """Give pages frames."""
        assert len(pages) <= len(self._free_frames), "more pages are being filled than were reckoned with"
        for page in pages:
            self._staged_P[page] = self._free_frames.pop()
        self._forget(pages)

    def _unstage(self, pages: Sequence[int]) -> None:
        """Their frames are free."""
        self._free_frames.extend(self._staged_P[pages].tolist())
        self._staged_P[pages] = -1

    def _bring(self, page: int) -> None:
        """Copy a page from below to its frame, all layers."""
        self.near.write_page(int(self._staged_P[page]), self.below.read_page(page))
        self.below.note_use(self.layout.page_bytes)

    def _forget(self, pages: Sequence[int]) -> None:
        """What the cache has of these pages is of another sequence."""
        for cache in self._cached if pages else ():
            cache.forget(pages)

    def _send_down(self) -> None:
        filled = torch.tensor([page for page in self._filled if page not in self._final], dtype=torch.int64)
        for layer_idx in range(self.layout.num_layers):
            self._lower(layer_idx, filled)
        self._unstage([*filled.tolist(), *self._final])
        self._filled = []
        self._final.clear()

    def _lower(self, layer_idx: int, pages_P: torch.Tensor) -> None:
        """Copy one layer of pages that have frames to the store, landmarks' keys behind them."""
        if not len(pages_P):
            return
        device = self.near.storage.device
        frames = self._staged_P[pages_P].to(device)
        self.near.landmarks[layer_idx, frames] = self.landmark_keys.read(layer_idx, pages_P.to(device))
        self._store.write(layer_idx, pages_P, self.near.storage[layer_idx].index_select(0, frames).cpu())

    def _fetch(self, layer_idx: int, pages_B: torch.Tensor) -> torch.Tensor:
        """Frames of full pages, which are near afterwards."""
        frames, missing = self._cached[layer_idx].place(pages_B)
        self.num_hits += len(pages_B) - int(missing.sum())
        if missing.any():
            self.num_fetched += int(missing.sum())
            blocks = self._store.read(layer_idx, pages_B[missing])
            put_blocks(self.near.storage[layer_idx], frames[missing] + self._num_staging, blocks)
        return frames + self._num_staging

    def _fetch_ahead(self, layer_idx: int, pages: torch.Tensor) -> None:
        self._fetch(layer_idx, pages[self._staged_P[pages] < 0])

    def _wait(self) -> None:
        if self._ahead is not None:
            ahead, self._ahead = self._ahead, None
            ahead.result()


class _LayerCache:
    """Which pages' blocks of one layer are in which frames."""

    def __init__(self, num_pages: int, num_frames: int) -> None:
        self._frame_P = torch.full((num_pages,), -1, dtype=torch.int64)
        self._page_F = torch.full((num_frames,), -1, dtype=torch.int64)
        self._used_F = torch.zeros(num_frames, dtype=torch.int64)
        self._clock = 0

    def place(self, pages_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Frames of pages, no more than there are frames and none twice; and which of them are to be filled."""
        self._clock += 1
        frames = self._frame_P[pages_B]
        missing = frames < 0
        self._used_F[frames[~missing]] = self._clock
        num_missing = int(missing.sum())
        if num_missing:
            victims = self._used_F.topk(num_missing, largest=False, sorted=False).indices
            old = self._page_F[victims]
            self._frame_P[old[old >= 0]] = -1
            self._page_F[victims], self._used_F[victims] = pages_B[missing], self._clock
            self._frame_P[pages_B[missing]] = victims
            frames[missing] = victims
        return frames, missing

    def forget(self, pages: Sequence[int]) -> None:
        """Their frames are free."""
        frames = self._frame_P[pages]
        frames = frames[frames >= 0]
        self._page_F[frames], self._used_F[frames] = -1, 0
        self._frame_P[pages] = -1
