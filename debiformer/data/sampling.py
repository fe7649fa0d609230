"""Which images make up which batch: a function of seed, epoch, rank and position, so that any batch of a run can be had again."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Sampler

from ..seeding import Use, seed_from

PADDING = -1  # an index that stands for no image


class Draw(NamedTuple):
    """An image that is to be read, and the epoch it is read in: what is random about it depends on both."""

    image: int
    epoch: int


class TrainingSampler(Sampler[Draw]):
    """Every image once per epoch, in an order of its own, but for the few that do not fill a batch on every process.

    A batch of all processes together is a slice of the epoch's order, and each process takes its part of it: however many processes
    there are, batches of the same total size hold the same images.

    Args:
        images: How many there are.
        batch_size: Images of one process in one batch.
        seed: Of the order.
        rank: Of this process.
        world_size: Processes.
        groups: A number for each image: batches hold images of one group, but for the few that are left over of each.

    Raises:
        ValueError: If there are fewer images than processes.
    """

    def __init__(
        self, images: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1, groups: Sequence[int] | None = None
    ) -> None:
        if images < world_size:
            raise ValueError(f"{images} images cannot be spread over {world_size} processes")
        self.images, self.seed, self.rank, self.world_size = images, seed, rank, world_size
        self.batch_size = min(batch_size, images // world_size)
        self.batches = images // (self.batch_size * world_size)  # per epoch
        self.groups = None if groups is None else torch.tensor(groups)
        self.epoch = self.first = 0

    def go_on(self, epoch: int, batch: int) -> None:
        """Begin with this batch of this epoch; the next epoch is whole again."""
        self.epoch, self.first = epoch, batch

    def set_epoch(self, epoch: int) -> None:
        """Draw the order of another epoch from now on; Lightning calls it."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.batches * self.batch_size

    def __iter__(self) -> Iterator[Draw]:
        epoch, first, self.first = self.epoch, self.first, 0
        generator = torch.Generator().manual_seed(seed_from(Use.ORDER, self.seed, epoch))
        order = torch.randperm(self.images, generator=generator)
        if self.groups is not None:
            order = self._grouped(order, generator)
        for batch in range(first, self.batches):
            start = (batch * self.world_size + self.rank) * self.batch_size
            yield from (Draw(index, epoch) for index in order[start : start + self.batch_size].tolist())

    def _grouped(self, order: Tensor, generator: torch.Generator) -> Tensor:
        """An order of as many whole batches, each of one group where there are enough of it, the batches in a random order."""
        size = self.batch_size * self.world_size
        assert self.groups is not None
        of_group = [order[self.groups[order] == group] for group in self.groups.unique()]
        whole = [part[: len(part) // size * size] for part in of_group]
        left_over = torch.cat([part[len(part) // size * size :] for part in of_group])
        batches = torch.cat([*whole, left_over[: len(left_over) // size * size]]).view(-1, size)
        return batches[torch.randperm(len(batches), generator=generator)].flatten()


class EvaluationSampler(Sampler[Draw]):
    """Every image once, spread over the processes; `PADDING` at the end gives each the same number of batches, as collectives need.

    Args:
        images: How many there are.
        rank: Of this process.
        world_size: Processes.
    """

    def __init__(self, images: int, rank: int = 0, world_size: int = 1) -> None:
        self.images, self.rank, self.world_size = images, rank, world_size

    def __len__(self) -> int:
        return -(-self.images // self.world_size)

    def __iter__(self) -> Iterator[Draw]:
        for index in range(self.rank, len(self) * self.world_size, self.world_size):
            yield Draw(index if index < self.images else PADDING, epoch=0)
