"""What the tasks on whole images share: how an image is given to them, and their schedules, counted in updates or with steps."""

import torch
from PIL.Image import Image
from timm.scheduler.multistep_lr import MultiStepLRScheduler
from timm.scheduler.poly_lr import PolyLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from ..nearest import did_you_mean
from .base import BaseTask

SCHEDULES = ("cosine", "poly", "step")


class DenseTask(BaseTask):
    """A task whose schedule is a cosine, a polynomial or steps, behind a warm-up that is counted in updates.

    A subclass has mean, std, schedule, power, milestones and warmup_steps among its arguments, besides those of `BaseTask`.
    """

    def normalized(self, image: Image) -> Tensor:
        """An image as the model takes it, (3, H, W), on its device."""
        mean, std = (torch.tensor(self.hparams[name], device=self.device).view(3, 1, 1) for name in ("mean", "std"))
        return pil_to_tensor(image).to(self.device).float().div_(255).sub_(mean).div_(std)

    def check_hyperparameters(self) -> None:
        """Raise a ValueError that names the first optimizer or schedule argument that cannot work."""
        super().check_hyperparameters()
        schedule, milestones, power = (self.hparams[name] for name in ("schedule", "milestones", "power"))
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule={schedule!r} is unknown: {did_you_mean(schedule, SCHEDULES)}")
        if schedule == "step" and (not milestones or list(milestones) != sorted(set(milestones)) or milestones[0] <= 0):
            raise ValueError(f"milestones={milestones} must be epochs that grow, for schedule='step'")
        if not power > 0:
            raise ValueError(f"power={power} must be above 0")

    def warmup(self, updates_per_epoch: int) -> tuple[str, int]:
        """The argument that says how long the warm-up is, and its updates."""
        return "warmup_steps", self.hparams["warmup_steps"]

    def schedule(self, optimizer: torch.optim.Optimizer, updates_per_epoch: int, updates: int, warmup: int) -> Scheduler:
        """Linear warm-up, then what `schedule` says."""
        hparams = self.hparams
        warm = dict(warmup_t=warmup, warmup_lr_init=hparams["warmup_lr"], t_in_epochs=False)
        if hparams["schedule"] == "poly":
            return PolyLRScheduler(optimizer, t_initial=updates, power=hparams["power"], lr_min=hparams["min_lr"], **warm)
        if hparams["schedule"] == "step":
            steps = [round(epoch * updates_per_epoch) + 1 for epoch in hparams["milestones"]]  # timm lowers the rate one update early
            return MultiStepLRScheduler(optimizer, decay_t=steps, decay_rate=0.1, warmup_prefix=False, **warm)
        return super().schedule(optimizer, updates_per_epoch, updates, warmup)
