"""Heads, segmenters and detectors: mmsegmentation's definitions, recorded in tests/golden/head_*, and torchvision's."""

import pytest
import timm
import torch
from goldens import Golden, image
from published import MASK_RCNN, RETINANET, published
from torch import nn

import debiformer
from debiformer.models.backbone import Backbone
from debiformer.models.detector import Detector
from debiformer.models.heads import FCNHead, SemanticFPNHead, UPerNetHead
from debiformer.models.segmenter import Segmenter

NANO = dict(feature_norms=True, region_grid=(4, 4))


class Heads(nn.Module):
    """What a Segmenter has besides its backbone."""

    def __init__(self, name, meta):
        super().__init__()
        channels, classes = meta["channels"], meta["num_classes"]
        if name == "head_semantic_fpn":
            self.head = SemanticFPNHead(channels, classes, pyramid_channels=32, channels=20)
        else:
            self.head = UPerNetHead(channels, classes, channels=24)
            self.auxiliary = FCNHead(channels[2], classes, channels=12)


@pytest.mark.parametrize("name", ["head_semantic_fpn", "head_upernet"])
def test_heads_compute_what_mmsegmentation_does(name):
    golden = Golden(name)
    heads = Heads(name, golden.meta).double().eval()
    rules = Segmenter("test_convnext", name.removeprefix("head_"), 3)
    heads.load_state_dict(rules.from_published(golden.state_dict))
    maps = [
        image(f"map{i}", [2, c, *size], 0).double()
        for i, (c, size) in enumerate(zip(golden.meta["channels"], golden.meta["sizes"], strict=True))
    ]
    with torch.no_grad():
        found = {"logits": heads.head(maps)}
        if name == "head_upernet":
            found["auxiliary"] = heads.auxiliary(maps[2])
    assert found.keys() == set(golden.arrays)
    for key, value in found.items():
        torch.testing.assert_close(value, torch.from_numpy(golden.arrays[key]), rtol=1e-9, atol=1e-9)


def test_a_published_segmenter_loads_with_its_head(tmp_path):
    golden = Golden("head_semantic_fpn")
    channels = timm.create_model("debiformer_nano", features_only=True).feature_info.channels()
    torch.manual_seed(1)
    args = dict(pyramid_channels=32, channels=20)
    model = Segmenter("debiformer_nano", "semantic_fpn", 7, backbone_args=NANO, head_args=args)
    given = {f"backbone.{key}": torch.rand_like(value) for key, value in model.backbone.maps.model.state_dict().items() if value.ndim}
    given |= {f"backbone.{key}": value for key, value in model.backbone.maps.model.state_dict().items() if not value.ndim}
    heads = {key: value for key, value in golden.state_dict.items() if "lateral" not in key}
    heads |= {f"neck.lateral_convs.{i}.conv.weight": torch.rand(32, c, 1, 1) for i, c in enumerate(channels)}
    heads |= {f"neck.lateral_convs.{i}.conv.bias": torch.rand(32) for i in range(4)}
    torch.save({"state_dict": given | heads, "meta": {"epoch": 1}}, tmp_path / "published.pth")
    debiformer.load_published(tmp_path / "published.pth", model)
    assert torch.equal(model.head.branches[3][2][0].weight, heads["decode_head.scale_heads.3.4.conv.weight"])
    assert torch.equal(model.head.pyramid.inner_blocks[2][0].weight, heads["neck.lateral_convs.2.conv.weight"])
    assert torch.equal(model.backbone.maps.model.stem[0].weight, given["backbone.stem.0.weight"])

    before = {key: value.clone() for key, value in model.state_dict().items()}
    odd = given | heads | {"decode_head.extra.weight": torch.zeros(1)}
    del odd["decode_head.conv_seg.bias"]
    with pytest.raises(ValueError, match=r"1 missing:\s+head\.classifier\.bias\s+1 unexpected:\s+decode_head\.extra\.weight"):
        debiformer.load_published(odd, model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items()), "nothing is loaded in part"


@pytest.mark.parametrize(("name", "names"), [("retinanet", RETINANET), ("mask_rcnn", MASK_RCNN)])
def test_a_published_detector_loads_with_its_heads(name, names):
    torch.manual_seed(1)
    source, model = (Detector(name, "debiformer_nano", 3, backbone_args=NANO, pyramid_channels=32) for _ in range(2))
    debiformer.load_published(published(source, names), model)
    source, model = source.eval().model, model.eval().model
    with torch.no_grad():
        features = [detector.backbone(torch.linspace(-1, 1, 3 * 96 * 96).view(1, 3, 96, 96)) for detector in (source, model)]
        torch.testing.assert_close(*features)
        levels = list(features[0].values())
        if name == "retinanet":
            torch.testing.assert_close(source.head(levels), model.head(levels))
            return
        torch.testing.assert_close(source.rpn.head(levels), model.rpn.head(levels))
        pooled = torch.randn(5, 32, 7, 7)
        (scores, boxes), (own_scores, own_boxes) = (d.roi_heads.box_predictor(d.roi_heads.box_head(pooled)) for d in (source, model))
        torch.testing.assert_close(own_scores, scores)
        torch.testing.assert_close(own_boxes[:, 4:], boxes[:, 4:])
        masks, own_masks = (d.roi_heads.mask_predictor(d.roi_heads.mask_head(torch.ones(5, 32, 14, 14))) for d in (source, model))
        torch.testing.assert_close(own_masks[:, 1:], masks[:, 1:])


class TestBackbone:
    @pytest.mark.parametrize("name", ["debiformer_nano", "biformer_tiny", "resnet18", "convnext_atto", "swin_tiny_patch4_window7_224"])
    def test_any_hierarchical_timm_model(self, name):
        backbone = Backbone(name, **({"img_size": 64} if "swin" in name else {}))
        maps = backbone(torch.randn(2, 3, 64, 64))
        assert [tuple(x.shape) for x in maps] == [(2, c, 64 // s, 64 // s) for c, s in zip(backbone.channels, (4, 8, 16, 32), strict=True)]
        assert backbone.no_weight_decay() <= {name for name, _ in backbone.named_parameters()}

    def test_no_hierarchy(self):
        with pytest.raises(ValueError, match=r"backbone='vit_tiny_patch16_224' gives maps at strides \[16, 16, 16, 16\]"):
            Backbone("vit_tiny_patch16_224")
        with pytest.raises(ValueError, match="backbone='resnet' is unknown to timm"):
            Backbone("resnet")

    @pytest.mark.parametrize("name", ["debiformer_nano", "resnet18"])
    def test_weights_of_a_classifier(self, name, tmp_path):
        model = timm.create_model(name, num_classes=5)
        torch.save(model.state_dict(), tmp_path / "weights.pth")
        own = Backbone(name, pretrained=str(tmp_path / "weights.pth")).maps.model.state_dict()
        assert all(torch.equal(value, model.state_dict()[key]) for key, value in own.items() if not key.startswith("feature_norms"))
        with pytest.raises(ValueError, match="does not fit"):
            Backbone("resnet34" if name == "resnet18" else "debiformer_tiny", pretrained=str(tmp_path / "weights.pth"))

    def test_frozen_norms(self):
        backbone = Backbone("resnet18", freeze_norms=True).train()
        before = {key: value.clone() for key, value in backbone.state_dict().items()}
        backbone(torch.randn(2, 3, 64, 64))[-1].sum().backward()
        assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items()), "no statistics are taken"
        assert backbone.maps.model.bn1.weight.grad is None
        assert backbone.maps.model.conv1.weight.grad is not None


@pytest.mark.parametrize("head", ["semantic_fpn", "upernet"])
def test_segmenter_on_any_size(head):
    model = Segmenter("debiformer_nano", head, 5, backbone_args=NANO, head_args=dict(channels=16))
    images = torch.randn(2, 3, 70, 101)
    found = model(images)
    assert isinstance(found, tuple) == (head == "upernet"), "the auxiliary head serves training"
    assert model.eval()(images).shape == (2, 5, 70, 101)


def test_upernet_wants_two_images_to_train_on():
    def maps(count):
        return [torch.randn(count, 8, side, side) for side in (16, 8, 4, 2)]

    head = UPerNetHead((8, 8, 8, 8), 3, channels=4)
    with pytest.raises(ValueError, match="batch_size=1: UPerNet's batch norms train on two images or more"):
        head(maps(1))
    assert head(maps(2)).shape == (2, 3, 16, 16)
    assert UPerNetHead((8, 8, 8, 8), 3, channels=4, pool_sizes=(2, 3))(maps(1)).shape == (1, 3, 16, 16)
    assert head.eval()(maps(1)).shape == (1, 3, 16, 16)


class TestDetectorOptions:
    @staticmethod
    def sizes(detector, levels, **options):
        """Heights and widths of the anchors at one place of each level."""
        model = Detector(detector, "test_convnext", 3, pyramid_channels=16, **options).model
        generator = model.anchor_generator if detector == "retinanet" else model.rpn.anchor_generator
        assert len(generator.cell_anchors) == levels
        return [(cell[:, 2:] - cell[:, :2]) for cell in generator.cell_anchors]

    @pytest.mark.parametrize(("options", "smallest"), [({}, 32), ({"anchor_scale": 2}, 16)])
    def test_anchors_of_retinanet(self, options, smallest):
        """Focal loss paper, section 4: areas of 32^2 to 512^2 on P3 to P7, three shapes, three sizes within an octave."""
        for level, found in enumerate(self.sizes("retinanet", 5, **options)):
            expected = [smallest * 2**level * 2 ** (octave / 3) for octave in range(3)]
            square = found.view(3, 3, 2)[1]
            torch.testing.assert_close(square, torch.tensor(expected)[:, None].expand(3, 2), rtol=0, atol=2)  # whole pixels
            torch.testing.assert_close(found[:, 1] / found[:, 0], torch.tensor([0.5, 1, 2]).repeat_interleave(3), rtol=0.15, atol=0)

    def test_anchors_of_mask_rcnn(self):
        for level, found in enumerate(self.sizes("mask_rcnn", 5)):
            assert found[1].tolist() == [32 * 2**level] * 2, "eight strides of 4 to 64"

    def test_norms_in_the_head(self):
        head = Detector("retinanet", "test_convnext", 3, pyramid_channels=16, head_norms=True).model.head
        norms = [module for module in head.modules() if isinstance(module, nn.GroupNorm)]
        assert [(norm.num_groups, norm.num_channels) for norm in norms] == [(2, 16)] * 8
        plain = Detector("retinanet", "test_convnext", 3, pyramid_channels=16).model.head
        assert not [module for module in plain.modules() if isinstance(module, nn.GroupNorm)]

    @pytest.mark.parametrize(
        ("detector", "options", "message"),
        [
            ("mask_rcnn", {"head_norms": True}, "head_norms=True is for retinanet"),
            ("retinanet", {"head_norms": True, "pyramid_channels": 20}, "a multiple of 8 as pyramid_channels=20"),
            ("retinanet", {"anchor_scale": 0.0}, r"anchor_scale=0\.0 must be 0\.25 or more"),
        ],
    )
    def test_what_does_not_go_together(self, detector, options, message):
        with pytest.raises(ValueError, match=message):
            Detector(detector, "test_convnext", 3, **options)
