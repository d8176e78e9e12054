"""What one epoch of training reads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader

from mpq_plugins._errors import DataError
from mpq_plugins._model import Batch, batches_of

TrainingData = Iterable[Any] | Callable[[int], Iterable[Any]]
"""Batches read afresh in every epoch, or a function from an epoch's number to its batches."""


class Epoch:
    """The batches of one epoch that this process trains on; `len()` gives their number, the same in every process.

    A list of batches is read in an order that torch's generator draws; a loader shuffles itself. Of processes that share
    the work each takes every n-th batch, and what does not give one batch to each is left out.
    """

    def __init__(self, data: TrainingData, number: int, *, accelerator: Any) -> None:
        self._items = data(number) if callable(data) else data
        self._share = (accelerator.process_index, accelerator.num_processes)
        self._accelerator = accelerator
        try:
            n_batches = len(self._items)  # type: ignore[arg-type]  # asked, not assumed
        except TypeError as error:
            raise DataError(
                f"training data of type {type(self._items).__name__} do not say how many batches an epoch has, which the "
                "learning rate follows. Give a DataLoader, a list, or an object with __len__."
            ) from error
        self._n = int(n_batches // self._share[1])
        if self._n < 1:
            raise DataError(
                f"an epoch has {n_batches} batches for {self._share[1]} processes, too few for one step. Give more data, or "
                "smaller batches."
            )

    def __len__(self) -> int:
        return self._n

    def __iter__(self) -> Iterator[Batch]:
        rank, n_processes = self._share
        items = self._items
        if isinstance(items, Sequence):
            order = torch.randperm(len(items)).tolist()
            items = [items[index] for index in order[rank::n_processes]]
        elif isinstance(items, DataLoader) and n_processes > 1:
            items = self._accelerator.prepare_data_loader(items, device_placement=False)
        elif n_processes > 1:
            items = islice(items, rank, None, n_processes)
        return islice(batches_of(items), self._n)
