"""What one epoch of training reads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, final

import torch
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from mpq_plugins.errors import DataError
from mpq_plugins.model.run import Batch, batches_of

TrainingData = Iterable[Any] | Callable[[int], Iterable[Any]]
"""Batches read afresh in every epoch, or a function from an epoch's number to its batches."""


@final
class Epoch:
    """The batches of one epoch that this process trains on; `len()` gives their number, the same in every process.

    A list of batches is read in an order that torch's generator draws; a loader shuffles itself, a generator of its own
    seeded with torch's, so that an epoch is the same whatever was read before it. Of `n_processes` that share the work each
    takes every n-th batch, and what does not give one batch to each is left out; a loader with a `DistributedSampler` has
    shared it already. Every process must have the same random state when an epoch is made.
    """

    def __init__(self, data: TrainingData, number: int, *, process: int = 0, n_processes: int = 1) -> None:
        self._items = data(number) if callable(data) else data
        self._process, self._n_processes = process, n_processes
        if isinstance(self._items, DataLoader):
            seed_loader(self._items)
            if isinstance(self._items.sampler, DistributedSampler):
                self._items.sampler.set_epoch(number)
                self._process, self._n_processes = 0, 1
        try:
            n_batches = len(self._items)  # type: ignore[arg-type]  # asked, not assumed
        except TypeError as error:
            raise DataError(
                f"training data of type {type(self._items).__name__} do not say how many batches an epoch has, which the "
                "learning rate follows. Give a DataLoader, a list, or an object with __len__."
            ) from error
        self._n = int(n_batches // self._n_processes)
        if self._n < 1:
            raise DataError(
                f"an epoch has {n_batches} batches for {n_processes} processes, too few for one step. Give more data, or "
                "smaller batches."
            )
        self._order = torch.randperm(n_batches).tolist() if isinstance(self._items, Sequence) else None

    def __len__(self) -> int:
        return self._n

    def __iter__(self) -> Iterator[Batch]:
        items, first, step = self._items, self._process, self._n_processes
        if isinstance(items, Sequence):
            assert self._order is not None  # a sequence got one
            return batches_of(items[index] for index in self._order[first::step][: self._n])
        if isinstance(items, DataLoader) and (step > 1 or items.persistent_workers):
            is_indexed = items.batch_sampler is not None and not isinstance(items.dataset, IterableDataset)
            items = _sharing(items, first, step) if is_indexed else islice(items, first, None, step)
        elif step > 1:
            items = islice(items, first, None, step)
        return islice(batches_of(items), self._n)

    def name_of(self, step: int) -> str:
        """The batch of a step (from 0), in words."""
        text = f"batch {step + 1} of {self._n}"
        if self._order is None:
            return text
        return f"{text}, item {self._order[self._process + step * self._n_processes]} of the data"


def seed_loader(items: Any) -> None:
    """Seed the generators that a loader has of its own with torch's; other data have none."""
    if isinstance(items, DataLoader):
        for generator in {items.generator, getattr(items.sampler, "generator", None)}:
            if isinstance(generator, torch.Generator):
                generator.manual_seed(torch.initial_seed())


# accelerate's own way keeps a generator in the user's sampler, whose state no checkpoint holds.
def _sharing(loader: DataLoader[Any], first: int, step: int) -> DataLoader[Any]:
    """A loader of every `step`-th batch from number `first` on, which loads no others.

    Its workers begin with the epoch, so that what they draw depends on nothing before it.
    """
    names = ("num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context", "generator")
    same = {name: getattr(loader, name) for name in (*names, "prefetch_factor")}
    return DataLoader(loader.dataset, batch_sampler=_EveryNth(loader.batch_sampler, first, step), **same)


@final
class _EveryNth:
    def __init__(self, batches: Any, first: int, step: int) -> None:
        self._batches, self._first, self._step = batches, first, step

    def __iter__(self) -> Iterator[list[int]]:
        return islice(self._batches, self._first, None, self._step)

    def __len__(self) -> int:
        return len(range(self._first, len(self._batches), self._step))
