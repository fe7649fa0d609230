"""Class activation maps: against their formula by hand, for every layout and task."""

import pytest
import timm
import torch
import torch.nn.functional as F

from debiformer.explain.grad_cam import boxes_of, class_activation, last_map, pixels_of
from debiformer.models.detector import Detector
from debiformer.models.segmenter import Segmenter

OURS = dict(backbone_args=dict(region_grid=4, feature_norms=True))


def by_hand(model, images, score, layer, channels_last):
    """Grad-CAM (Selvaraju et al., eqs. 1-2): the channels of a layer, weighed by the mean gradient of each."""
    kept = {}

    def keep(_, __, out):
        out.retain_grad()
        kept["map"] = out

    handle = model.get_submodule(layer).register_forward_hook(keep)
    score(model(images)).backward()
    handle.remove()
    x, gradient = kept["map"].detach(), kept["map"].grad
    if channels_last:
        x, gradient = (t.permute(0, 3, 1, 2) for t in (x, gradient))
    cam = (x * gradient.mean((2, 3), keepdim=True)).sum(1).relu()
    model.zero_grad(set_to_none=True)
    return cam


def peaked(cam):
    low, high = cam.amin((1, 2), keepdim=True), cam.amax((1, 2), keepdim=True)
    return (cam - low) / (high - low)


@pytest.mark.parametrize(
    ("name", "layer", "channels_last"),
    [
        ("debiformer_nano", "stages.3", False),
        ("debiformer_nano", "stages.2.blocks.1", True),
        ("debiformer_nano", "stages.2.blocks.0.norm2", None),
        ("biformer_stl", "stages.1", False),
        ("resnet18", "layer3", False),
        ("swin_tiny_patch4_window7_224", "layers.2", True),
    ],
)
def test_maps_are_those_of_the_formula_in_every_layout(name, layer, channels_last):
    torch.manual_seed(0)
    options = dict(img_size=(64, 96)) if name.startswith("swin") else {}
    model = timm.create_model(name, num_classes=5, **options).eval()
    images = torch.randn(2, 3, 64, 96)
    if channels_last is None:  # tokens (B, N, C)
        with pytest.raises(ValueError, match="is no map"):
            class_activation(model, images, [1, 4], layer)
        return
    found = class_activation(model, images, [1, 4], layer)
    expected = by_hand(model, images, lambda out: out[0, 1] + out[1, 4], layer, channels_last)
    assert found.shape == (2, 64, 96)
    assert found.min() >= 0
    assert found.max() == pytest.approx(1, abs=1e-4)
    # grad-cam enlarges by OpenCV's bilinear resize, as interpolate does.
    large = F.interpolate(peaked(expected)[:, None], size=(64, 96), mode="bilinear")[:, 0]
    torch.testing.assert_close(found, peaked(large), atol=2e-3, rtol=0)


def test_the_model_is_left_as_it_was():
    torch.manual_seed(0)
    model = timm.create_model("debiformer_nano", num_classes=5).train()
    model.stages[0].eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.head.fc.weight.grad = torch.ones_like(model.head.fc.weight)
    images = torch.randn(1, 3, 64, 64)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.inference_mode():
        assert class_activation(model, images, [1], "stages.1").max() > 0.99
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert (model.training, model.stages[0].training, model.stages[1].training) == (True, False, True)
    assert torch.equal(model.head.fc.weight.grad, torch.ones_like(model.head.fc.weight))
    assert not any(m._forward_hooks for m in model.modules())


def test_pixels_of_a_class_are_explained_in_a_segmenter():
    torch.manual_seed(0)
    model, images = Segmenter("debiformer_nano", "semantic_fpn", 4, **OURS).eval(), torch.randn(1, 3, 64, 96)
    mask = torch.zeros(64, 96)
    mask[10:20, 30:60] = 1
    assert last_map(model) == "backbone.maps.model.stages.3"
    layer = "backbone.maps.model.stages.1"
    found = class_activation(model, images, [pixels_of(2, mask)], layer)
    expected = by_hand(model, images, lambda out: out[0, 2][mask.bool()].mean(), layer, False)
    large = F.interpolate(peaked(expected)[:, None], size=(64, 96), mode="bilinear")[:, 0]
    torch.testing.assert_close(found, peaked(large), atol=2e-3, rtol=0)


def test_a_box_is_explained_in_a_detector():
    torch.manual_seed(0)
    model = Detector("retinanet", "debiformer_nano", 3, short_side=64, long_side=96, detector_args=dict(score_thresh=0.0), **OURS).eval()
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        (found,) = model(images)
    box, label = found["boxes"][3], int(found["labels"][3])
    cam = class_activation(model, images, [boxes_of(label, box)])
    expected = by_hand(model, images, lambda out: out[0]["scores"][3], last_map(model), False)
    large = F.interpolate(peaked(expected)[:, None], size=(64, 96), mode="bilinear")[:, 0]
    torch.testing.assert_close(cam, peaked(large), atol=2e-3, rtol=0)
    nowhere = class_activation(model, images, [boxes_of(label, torch.tensor([0.0, 0.0, 1.0, 1.0]))])
    assert not nowhere.any()


@pytest.mark.parametrize("method", ["grad_cam_plus_plus", "hires_cam", "layer_cam", "xgrad_cam", "eigen_cam"])
def test_its_kin(method):
    torch.manual_seed(0)
    model = timm.create_model("debiformer_nano", num_classes=5).eval()
    found = class_activation(model, torch.randn(1, 3, 64, 64), [3], "stages.1", method)
    assert found.shape == (1, 64, 64)
    assert found.isfinite().all()


def test_targets_may_be_a_tensor():
    model, images = timm.create_model("debiformer_nano", num_classes=5).eval(), torch.randn(2, 3, 64, 64)
    assert torch.equal(class_activation(model, images, torch.tensor([1, 3])), class_activation(model, images, [1, 3]))


def test_bad_requests_say_what_is_valid():
    model, images = timm.create_model("debiformer_nano", num_classes=5).eval(), torch.randn(1, 3, 64, 64)
    for kwargs, message in [
        (dict(layer="stages.4"), "layer='stages.4' is no module of DeBiFormer: did you mean stages"),
        (dict(method="gradcam"), "method='gradcam' is none of grad_cam"),
        (dict(targets=[1, 2]), "2 targets for 1 images"),
        (dict(targets=3), "targets=3 must be a class index, or a function of the output, for each image"),
        (dict(targets=[5]), "target 5 is not one of the 5 classes, from 0 on"),
        (dict(targets=[-1]), "target -1 is not one of the 5 classes"),
    ]:
        with pytest.raises(ValueError, match=message):
            class_activation(model, images, **({"targets": [1]} | kwargs))
    cube = timm.create_model("resnet18", num_classes=5).eval()  # 64 channels of 64x64
    with pytest.raises(ValueError, match=r"gives \(1, 64, 64, 64\) for images of \(128, 128\): say whether channels_last"):
        class_activation(cube, torch.randn(1, 3, 128, 128), [1], "conv1")
    assert class_activation(cube, torch.randn(1, 3, 128, 128), [1], "conv1", channels_last=False).shape == (1, 128, 128)
    with pytest.raises(ValueError, match="Linear has no timm model inside"):
        class_activation(torch.nn.Linear(3, 3), images, [1])
