"""Segmentation and detection tasks: their metrics against other libraries, their losses and schedules."""

import contextlib
import io
import warnings

import numpy as np
import pytest
import torch
from lightning import LightningDataModule, Trainer
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from debiformer.data.base import ImageBatch
from debiformer.tasks.detection import DetectionTask
from debiformer.tasks.segmentation import IGNORED, SegmentationTask, pixel_loss

NAMES = ["a", "b", "c", "d"]
PALETTE = [(index, 0, 0) for index in range(4)]
QUIET = dict(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")


class Batches(LightningDataModule):
    """Batches that are there already, for training and for evaluation."""

    def __init__(self, batches):
        super().__init__()
        self.batches, self.batch_size = batches, 2

    def train_dataloader(self):
        return DataLoader(self.batches, batch_size=None)

    val_dataloader = test_dataloader = train_dataloader


def segmentation(**options):
    torch.manual_seed(0)
    return SegmentationTask("test_convnext" if "backbone" not in options else options.pop("backbone"), NAMES, PALETTE, **options)


def crops(count=2, size=32):
    torch.manual_seed(1)
    targets = torch.randint(0, 4, (count, 2, size, size), dtype=torch.int16)
    targets[:, :, :4] = IGNORED
    return [ImageBatch(torch.randn(2, 3, size, size), target, ["x", "y"], []) for target in targets]


class TestSegmentation:
    def test_scores(self):
        """On images of two sizes, with pixels that do not count and a class that is never there."""
        task = segmentation()
        torch.nn.init.normal_(task.model.head.classifier.weight, std=1.0)
        torch.manual_seed(1)
        images = [torch.randn(3, 40, 56), torch.randn(3, 32, 32), torch.randn(3, 56, 40)]
        targets = [torch.randint(0, 3, image.shape[1:], dtype=torch.int16) for image in images]
        targets[0][:9] = IGNORED
        batches = [ImageBatch(images[:2], targets[:2], ["x", "y"], []), ImageBatch(images[2:], targets[2:], ["z"], [])]
        (found,) = Trainer(**QUIET).test(task, datamodule=Batches(batches), verbose=False)
        task.eval()
        guesses = torch.cat([task.segment(image).long().flatten() for image in images])
        flat = torch.cat([target.long().flatten() for target in targets])
        jaccard = MulticlassJaccardIndex(4, average=None, ignore_index=IGNORED)(guesses, flat)
        accuracy = MulticlassAccuracy(4, average=None, ignore_index=IGNORED)(guesses, flat)
        assert len(guesses.unique()) > 1
        there = [0, 1, 2, *([3] if (guesses == 3).any() else [])]
        assert found["test/miou"] == pytest.approx(jaccard[there].mean().item(), abs=1e-6)
        assert found["test/macc"] == pytest.approx(accuracy[:3].mean().item(), abs=1e-6)
        assert found["test/aacc"] == pytest.approx((guesses == flat)[flat != IGNORED].float().mean().item(), abs=1e-6)
        assert [score.pixels for score in task.class_scores] == [int((flat == label).sum()) for label in range(4)]
        assert [score.iou for score in task.class_scores][:3] == pytest.approx(jaccard[:3].tolist(), abs=1e-6)

    def test_loss(self):
        logits, targets = torch.randn(2, 4, 8, 8, requires_grad=True), torch.randint(0, 4, (2, 8, 8))
        torch.testing.assert_close(pixel_loss(logits, targets), F.cross_entropy(logits, targets))
        targets[0] = IGNORED
        torch.testing.assert_close(pixel_loss(logits, targets), F.cross_entropy(logits[1:], targets[1:]))
        targets[1] = IGNORED
        loss = pixel_loss(logits, targets)
        loss.backward()
        assert loss == 0
        assert (logits.grad == 0).all(), "and not nan"

    @pytest.mark.parametrize("head", ["semantic_fpn", "upernet"])
    def test_training(self, head):
        """A batch is learnt by heart."""
        task = segmentation(head=head, head_args={"channels": 16}, lr=0.01, schedule="cosine")
        batch = ImageBatch(torch.randn(2, 3, 32, 32), (torch.arange(32)[None, None] // 8).expand(2, 32, 32).short(), ["x", "y"], [])
        trainer = Trainer(**QUIET, max_epochs=30)
        trainer.fit(task, Batches([batch]))
        assert trainer.callback_metrics["val/miou"] > 0.8

    def test_auxiliary_loss(self, monkeypatch):
        task, (batch, _) = segmentation(head="upernet", head_args={"channels": 16}, auxiliary_weight=0.25), crops()
        logits, auxiliary = torch.randn(2, 4, 32, 32), torch.randn(2, 4, 32, 32)
        monkeypatch.setattr(task.model, "forward", lambda images: (logits, auxiliary))
        monkeypatch.setattr(task, "log_training", lambda *_: None)
        targets = batch.targets.long()
        main, other = (F.cross_entropy(given, targets, ignore_index=IGNORED) for given in (logits, auxiliary))
        torch.testing.assert_close(task.training_step(batch, 0), main + 0.25 * other)

    def test_schedules(self):
        """Linear warm-up; then (1 - t / T) ** power, steps at epochs, or a cosine; against their formulas."""
        expected = {
            "poly": lambda t: 1e-3 * (1 - t / 40) ** 0.9,
            "step": lambda t: 1e-3 * 0.1 ** ((t >= 20) + (t >= 30)),
            "cosine": lambda t: 1e-3 * 0.5 * (1 + np.cos(np.pi * t / 40)),
        }
        for name, rate in expected.items():
            task = segmentation(schedule=name, lr=1e-3, power=0.9, milestones=[2, 3], warmup_steps=5, warmup_lr=0.0, optimizer="sgd")
            rates = []
            task.on_before_optimizer_step = lambda optimizer, rates=rates: rates.append(optimizer.param_groups[0]["lr"])
            Trainer(**QUIET, max_epochs=4, limit_val_batches=0).fit(task, Batches(crops(10)))
            assert rates[:5] == pytest.approx([1e-3 * t / 5 for t in range(5)], abs=1e-9), name
            assert rates[5:] == pytest.approx([rate(t) for t in range(5, 40)], rel=1e-6), name

    def test_no_decay_on_norms_and_tables(self):
        task = segmentation(backbone="debiformer_nano", weight_decay=0.3)
        Trainer(**QUIET, max_epochs=1, limit_val_batches=0).fit(task, Batches(crops(1, 64)))
        names = {id(parameter): name for name, parameter in task.model.named_parameters()}
        decay = {names[id(p)]: group["weight_decay"] for group in task.optimizers().param_groups for p in group["params"]}
        for name, value in decay.items():
            table = name.endswith("bias_table")
            norm_or_bias = task.model.get_parameter(name).ndim <= 1
            assert value == (0.0 if table or norm_or_bias else 0.3), name
        assert any(name.endswith("bias_table") for name in decay)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"head": "fcn"}, "head='fcn' is none of semantic_fpn, upernet"),
            ({"backbone": "vit_tiny_patch16_224"}, "gives maps at strides"),
            ({"head_args": {"chanels": 3}}, "semantic_fpn takes no chanels; did you mean channels"),
            ({"scales": (float("nan"),)}, r"scales=\(nan,\) are not factors above 0"),
            ({"schedule": "steps"}, "schedule='steps' is unknown: did you mean step"),
            ({"schedule": "step"}, "milestones=None must be epochs that grow"),
            ({"schedule": "step", "milestones": [3, 2]}, r"milestones=\[3, 2\] must be epochs that grow"),
            ({"warmup_steps": -1}, "warmup_steps=-1 must not be below 0"),
            ({"window": 0}, "window=0 is not a number of pixels"),
            ({"optimizer": "adamv"}, "optimizer='adamv' is unknown to timm"),
        ],
    )
    def test_bad_arguments(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            segmentation(**arguments)

    def test_a_warm_up_longer_than_the_run(self):
        with pytest.raises(ValueError, match=r"warmup_steps=50 takes 50 updates and the whole run has 2: .*model.warmup_steps"):
            Trainer(**QUIET, max_epochs=1).fit(segmentation(warmup_steps=50), Batches(crops()))


def detection(**options):
    torch.manual_seed(0)
    sizes = dict(short_side=64, long_side=96, pyramid_channels=16, schedule="cosine")
    return DetectionTask("test_convnext", NAMES, **sizes | options)


def fields(count=3, masks=False):
    """Images with some boxes of every size, some of them crowds."""
    torch.manual_seed(2)
    batches = []
    for number in range(count):
        corner, side = torch.rand(6, 2) * 60, torch.rand(6, 2) * 110 + 5
        boxes = torch.cat([corner, (corner + side).clamp(max=torch.tensor([160.0, 120.0]))], dim=1)
        target = dict(boxes=boxes, labels=torch.randint(0, 3, (6,)), crowd=torch.arange(6) == 5, id=torch.tensor(number))
        target["area"] = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        if masks:
            target["masks"] = torch.zeros(6, 120, 160, dtype=torch.uint8)
            for mask, (x0, y0, x1, y1) in zip(target["masks"], boxes.int().tolist(), strict=True):
                mask[y0:y1, x0:x1] = 1
        batches.append(ImageBatch([torch.randn(3, 120, 160)], [target], [str(number)], []))
    return batches


def by_pycocotools(batches, found, kind):
    """AP, AP50, AP75, of small, medium and large."""
    images = [dict(id=number, width=160, height=120) for number in range(len(batches))]
    rows, guesses = [], []

    def shape(box, mask):
        from pycocotools import mask as pycoco

        x0, y0, x1, y1 = box.tolist()
        if kind == "segm":
            return {"segmentation": pycoco.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))}
        return {"bbox": [x0, y0, x1 - x0, y1 - y0]}

    for number, (batch, boxes) in enumerate(zip(batches, found, strict=True)):
        target = batch.targets[0]
        for i, box in enumerate(target["boxes"]):
            ids = dict(id=len(rows) + 1, image_id=number, category_id=int(target["labels"][i]))
            extra = dict(iscrowd=int(target["crowd"][i]), area=float(target["area"][i]))
            rows.append(ids | extra | shape(box, target["masks"][i] if "masks" in target else None))
        for i, box in enumerate(boxes["boxes"]):
            mask = boxes["masks"][i, 0] > 0.5 if "masks" in boxes else None
            guesses.append(dict(image_id=number, category_id=int(boxes["labels"][i]), score=float(boxes["scores"][i])) | shape(box, mask))
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = dict(
            images=images, annotations=rows, categories=[dict(id=label, name=name) for label, name in enumerate(NAMES)], info={}
        )
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(guesses), kind)
        evaluation.evaluate(), evaluation.accumulate(), evaluation.summarize()
    return evaluation.stats[:6].tolist()


class TestDetection:
    @pytest.mark.parametrize("masks", [False, True])
    def test_scores_are_those_of_pycocotools(self, masks, monkeypatch):
        """Of a detector that finds most boxes, a little beside their places, some twice, and some that are not there."""
        task, batches = detection(detector="mask_rcnn" if masks else "retinanet"), fields(masks=masks)
        torch.manual_seed(4)
        found = []
        for batch in batches:
            target = batch.targets[0]
            boxes = torch.cat([target["boxes"], target["boxes"][:2]]) + torch.randn(8, 4)
            boxes[0] = torch.tensor([1.0, 1, 30, 30])
            guess = dict(boxes=boxes, labels=torch.cat([target["labels"], target["labels"][:2]]), scores=torch.rand(8))
            if masks:
                guess["masks"] = torch.cat([target["masks"], target["masks"][:2]])[:, None].float()
                guess["masks"][:, :, :40] = 0
            found.append(guess)
        answers = iter(found)
        monkeypatch.setattr(task.model, "forward", lambda images: [next(answers)])
        (scores,) = Trainer(**QUIET).test(task, datamodule=Batches(batches), verbose=False)
        names = ("map", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
        assert 0.1 < scores["test/map"] < 0.9
        assert [scores[f"test/{name}"] for name in names] == pytest.approx(by_pycocotools(batches, found, "bbox"), abs=1e-6)
        if masks:
            assert [scores[f"test/mask_{name}"] for name in names] == pytest.approx(by_pycocotools(batches, found, "segm"), abs=1e-6)
        assert [score.name for score in task.class_scores] == NAMES
        assert task.class_scores[3].boxes == -1.0, "no box is of it"
        assert (task.class_scores[0].masks is not None) == masks

    @pytest.mark.parametrize("detector", ["retinanet", pytest.param("faster_rcnn", marks=pytest.mark.thorough), "mask_rcnn"])
    def test_one_object_is_learnt(self, detector):
        """From scratch, on one image with one white square: its box is found, and with Mask R-CNN its mask."""
        image = torch.zeros(3, 64, 96)
        image[:, 20:52, 30:70] = 1.0
        mask = image[:1].to(torch.uint8)
        target = dict(boxes=torch.tensor([[30.0, 20, 70, 52]]), labels=torch.tensor([1]), masks=mask)
        few = {} if detector == "retinanet" else dict(box_batch_size_per_image=128, rpn_post_nms_top_n_train=200)
        task = detection(detector=detector, detector_args=few, lr=3e-3, weight_decay=0.0, warmup_steps=10)
        batch = ImageBatch([image, image], [target, target], ["x", "y"], [])
        Trainer(**QUIET, max_epochs=150 if detector == "retinanet" else 60, limit_val_batches=0).fit(task, Batches([batch]))
        with torch.no_grad():
            (found,) = task.eval()([image])
        assert found["scores"][0] > 0.5
        assert found["labels"][0] == 1
        torch.testing.assert_close(found["boxes"][0], target["boxes"][0], atol=4.0, rtol=0)
        if detector == "mask_rcnn":
            guess = found["masks"][0, 0] > 0.5
            assert (guess & mask[0].bool()).sum() / (guess | mask[0].bool()).sum() > 0.7

    def test_images_without_boxes(self):
        task = detection(detector="mask_rcnn")
        nothing = dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64), masks=torch.zeros(0, 64, 96, dtype=torch.uint8))
        Trainer(**QUIET, max_epochs=1, limit_val_batches=0).fit(task, Batches([ImageBatch([torch.randn(3, 64, 96)], [nothing], ["x"], [])]))
        assert all(parameter.isfinite().all() for parameter in task.parameters())

    def test_what_stands_in_for_an_image_does_not_count(self, monkeypatch):
        task = detection()
        guess = dict(boxes=torch.ones(1, 4), labels=torch.tensor([0]), scores=torch.ones(1))
        monkeypatch.setattr(task.model, "forward", lambda images: [guess])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            task._evaluate(ImageBatch([torch.zeros(3, 32, 32)], [None], [""], []))
        assert not task.precision_of.detection_box
        assert task.images_in(ImageBatch([torch.zeros(3, 32, 32)] * 2, [None] * 2, ["", "x"], [])) == 1

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"detector": "yolo"}, "detector='yolo' is none of retinanet, faster_rcnn, mask_rcnn"),
            ({"detector_args": {"anchors": 3}}, "retinanet takes no anchors; did you mean anchor_generator"),
            ({"detector_args": {"min_size": 300}}, "retinanet takes no min_size"),
            ({"short_side": 0}, "short_side=0 must be above 0"),
        ],
    )
    def test_bad_arguments(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            detection(**arguments)
