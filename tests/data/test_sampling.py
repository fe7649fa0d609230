from itertools import islice

from hypothesis import given
from hypothesis import strategies as st

from debiformer.data.sampling import PADDING, EvaluationSampler, TrainingSampler


def epoch_of(sampler):
    return [draw.image for draw in sampler]


@given(images=st.integers(1, 60), batch_size=st.integers(1, 9), world_size=st.integers(1, 4), epoch=st.integers(0, 3))
def test_processes_share_an_epoch(images, batch_size, world_size, epoch):
    """Disjoint parts of one order, with no image twice and no more left out than would not fill a batch."""
    if images < world_size:
        return
    samplers = [TrainingSampler(images, batch_size, 7, rank, world_size) for rank in range(world_size)]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    parts = [epoch_of(sampler) for sampler in samplers]
    assert [len(part) for part in parts] == [len(sampler) for sampler in samplers]
    drawn = [index for part in parts for index in part]
    assert len(set(drawn)) == len(drawn)
    assert images - len(drawn) < samplers[0].batch_size * world_size


def test_batches_hold_the_same_images_however_many_processes_there_are():
    def batches(world_size):
        parts = [epoch_of(TrainingSampler(48, 12 // world_size, 7, rank, world_size)) for rank in range(world_size)]
        size = 12 // world_size
        return [{index for part in parts for index in part[at : at + size]} for at in range(0, 48 // world_size, size)]

    assert batches(1) == batches(2) == batches(3)


def test_epochs_and_seeds_have_orders_of_their_own():
    def order(seed, epoch):
        sampler = TrainingSampler(40, 4, seed)
        sampler.set_epoch(epoch)
        return epoch_of(sampler)

    orders = [order(seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(o) for o in orders}) == 4
    assert order(1, 1) == orders[3]
    assert {draw.epoch for draw in TrainingSampler(8, 2, 0)} == {0}


@given(batch=st.integers(0, 9))
def test_going_on_gives_what_was_left(batch):
    whole, rest = TrainingSampler(40, 4, 3), TrainingSampler(40, 4, 3)
    whole.set_epoch(2)
    rest.go_on(2, batch)
    rest.set_epoch(2)  # as Lightning does before every epoch
    assert list(rest) == list(islice(whole, 4 * batch, None))
    rest.set_epoch(3)
    assert len(list(rest)) == 40, "the epoch after is whole"


@given(images=st.integers(1, 30), world_size=st.integers(1, 4))
def test_evaluation_covers_every_image_once(images, world_size):
    parts = [epoch_of(EvaluationSampler(images, rank, world_size)) for rank in range(world_size)]
    assert {len(part) for part in parts} == {-(-images // world_size)}
    drawn = [index for part in parts for index in part]
    assert sorted(index for index in drawn if index != PADDING) == list(range(images))
