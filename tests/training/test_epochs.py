"""What an epoch reads: every batch once, in an order that the seed alone decides, shared between processes."""

import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset, WeightedRandomSampler

from mpq_plugins.errors import DataError
from mpq_plugins.training.epochs import Epoch

NUMBERS = torch.arange(24.0)


def read(data, number=0, **share) -> list[list[float]]:
    torch.manual_seed(number)
    return [batch.inputs.tolist() for batch in Epoch(data, number, **share)]


def loader(**options) -> DataLoader:
    return DataLoader(TensorDataset(NUMBERS), **{"batch_size": 4, "shuffle": True, **options})


DATA = {
    "list": list(NUMBERS.split(4)),
    "loader": loader(),
    "loader with a generator": loader(generator=torch.Generator().manual_seed(5)),
    "loader with workers": loader(num_workers=1),
    "loader with a sampler": loader(shuffle=False, sampler=WeightedRandomSampler(torch.ones(24), 24, replacement=False)),
}


@pytest.mark.parametrize("name", DATA)
def test_the_seed_decides_the_order(name):
    """An epoch read again is the same, another one differs, and each reads every image once."""
    first, second = read(DATA[name], 1), read(DATA[name], 2)
    assert first != second
    assert read(DATA[name], 1) == first
    for batches in (first, second):
        assert sorted(number for batch in batches for number in batch) == NUMBERS.tolist()


@pytest.mark.parametrize("name", DATA)
def test_processes_share_the_batches(name):
    """Two processes read alternate batches of the order that one reads."""
    whole = read(DATA[name])
    assert [read(DATA[name], process=rank, n_processes=2) for rank in (0, 1)] == [whole[0::2], whole[1::2]]


class Noisy(TensorDataset):
    """Draws a number for every item, as random crops do."""

    def __getitem__(self, index):
        return super().__getitem__(index)[0] + torch.rand(())


def test_workers_draw_the_same_whatever_they_read_before():
    """Also those that live on between epochs: an epoch after a restart is the one that it would have been."""
    options = {"batch_size": 4, "num_workers": 2, "persistent_workers": True}
    old, new = DataLoader(Noisy(NUMBERS), **options), DataLoader(Noisy(NUMBERS), **options)
    assert read(old, 0) != read(old, 1)
    assert read(old, 2) == read(new, 2)


def test_what_does_not_give_one_batch_to_each_is_left_out():
    """Of six batches four processes read one each."""
    assert [len(read(DATA["list"], process=rank, n_processes=4)) for rank in range(4)] == [1] * 4
    with pytest.raises(DataError, match="6 batches for 7 processes"):
        read(DATA["list"], n_processes=7)


def test_a_loader_that_is_shared_already_is_read_whole():
    """A DistributedSampler has given this process its share, another in every epoch."""
    sampler = DistributedSampler(TensorDataset(NUMBERS), num_replicas=2, rank=0)
    shared = loader(shuffle=False, sampler=sampler)
    first, second = (read(shared, number, process=0, n_processes=2) for number in (0, 1))
    assert len(first) == len(second) == 3
    assert first != second


def test_streams_are_shared_too():
    """Of a loader of a stream, which has no indices, each process takes every other batch of the same stream."""

    class Stream(IterableDataset):
        def __len__(self):
            return 24

        def __iter__(self):
            return iter(NUMBERS)

    stream = DataLoader(Stream(), batch_size=4)
    assert read(stream, process=1, n_processes=2) == [batch.tolist() for batch in NUMBERS.split(4)[1::2]]


def test_a_function_gives_each_epoch_its_data():
    """It is asked with the epoch's number, and lengths may change."""
    assert [len(read(lambda number: DATA["list"][: number + 1], number)) for number in range(3)] == [1, 2, 3]


def test_a_batch_is_named_as_the_user_knows_it():
    """The item that is named is the one that was read, in every process."""
    for rank in (0, 1):
        torch.manual_seed(3)
        epoch = Epoch(DATA["list"], 0, process=rank, n_processes=2)
        item = int(epoch.name_of(1).split()[-4])
        assert epoch.name_of(1) == f"batch 2 of 3, item {item} of the data"
        assert torch.equal(list(epoch)[1].inputs, DATA["list"][item])
    assert Epoch(DATA["loader"], 0).name_of(1) == "batch 2 of 6"
