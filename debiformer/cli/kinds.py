"""The tasks that fit, validate and test know: what each takes from its data, what it is judged by, and how it is reported."""

from collections.abc import Callable
from typing import Any, NamedTuple

from ..tasks.base import BaseTask
from ..tasks.classification import ClassificationTask
from ..tasks.detection import DetectionTask
from ..tasks.prediction import PREPROCESSING
from ..tasks.segmentation import SegmentationTask
from . import detection, evaluation, segmentation


class Kind(NamedTuple):
    """A task of the command line."""

    task: type[BaseTask]
    from_data: tuple[str, ...]  # arguments that the data gives
    architecture: tuple[str, ...]  # arguments that make the model what it is: evaluation takes them from the checkpoint
    monitor: str  # the metric that says which checkpoint is the best; more is better
    add_arguments: Callable[[Any, str], None]
    report: Callable[..., None]


KINDS = {
    "classification": Kind(
        ClassificationTask,
        from_data=("class_names", *PREPROCESSING),
        architecture=("model", "model_args", "drop_path_rate"),
        monitor="val/acc",
        add_arguments=evaluation.add_arguments,
        report=evaluation.report,
    ),
    "segmentation": Kind(
        SegmentationTask,
        from_data=("class_names", "palette", "mean", "std", "short_side", "long_side"),
        architecture=("backbone", "backbone_args", "head", "head_args", "drop_path_rate"),
        monitor="val/miou",
        add_arguments=segmentation.add_arguments,
        report=segmentation.report,
    ),
    "detection": Kind(
        DetectionTask,
        from_data=("class_names", "mean", "std"),
        architecture=(
            *("backbone", "backbone_args", "drop_path_rate", "detector", "detector_args"),
            *("pyramid_channels", "anchor_scale", "head_norms"),
        ),
        monitor="val/map",
        add_arguments=detection.add_arguments,
        report=detection.report,
    ),
}
