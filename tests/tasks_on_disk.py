"""Tasks with random weights, saved as a trainer saves them."""

import torch
from lightning import Trainer

from debiformer.tasks.classification import ClassificationTask

CLASSES = ["a", "b", "c"]


def random_task(model="test_convnext", classes=CLASSES, **arguments):
    """A task whose weights and buffers have no two numbers alike: a model at its start has many zeros and ones."""
    task = ClassificationTask(model, list(classes), **arguments)
    for value in task.state_dict().values():
        if value.is_floating_point():
            value.add_(torch.rand_like(value) * 0.1)
        else:
            value.add_(torch.randint(1, 1000, ()))
    return task.eval()


def save(task, path):
    """Write a checkpoint of a task, and return its path."""
    trainer = Trainer(accelerator="cpu", logger=False)
    trainer.strategy.connect(task)
    trainer.save_checkpoint(path)
    return path
