"""The backbones inside other libraries: a training step and a prediction with each."""

import pytest
import timm
import torch
from torch.nn import functional as F
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import BackboneWithFPN

import debiformer  # noqa: F401  # registers the models
from debiformer.models.backbone import Backbone

IMAGES = torch.randn(2, 3, 64, 96)
MASKS = torch.randint(0, 5, (2, 64, 96))


def step(model, loss):
    """An update, which must change the first and the last weights of the backbone."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    loss().backward()
    optimizer.step()
    changed = [not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True)]
    assert sum(changed) > 0.9 * len(changed)


@pytest.mark.parametrize("decoder", ["FPN", "UPerNet"])
def test_segmentation_models_pytorch(decoder):
    smp = pytest.importorskip("segmentation_models_pytorch")
    model = getattr(smp, decoder)("tu-debiformer_nano", encoder_weights=None, classes=5)
    step(model, lambda: F.cross_entropy(model(IMAGES), MASKS))
    assert model.eval()(IMAGES).shape == (2, 5, 64, 96)


class TestTransformers:
    @pytest.fixture
    def config(self):
        transformers = pytest.importorskip("transformers")
        return transformers.TimmBackboneConfig(backbone="debiformer_nano", use_pretrained_backbone=False, out_indices=[0, 1, 2, 3])

    def test_upernet(self, config):
        from transformers import UperNetConfig, UperNetForSemanticSegmentation

        model = UperNetForSemanticSegmentation(
            UperNetConfig(backbone_config=config, hidden_size=16, num_labels=5, auxiliary_in_channels=128)
        )
        step(model, lambda: model(IMAGES, labels=MASKS).loss)
        assert model.eval()(IMAGES).logits.shape == (2, 5, 64, 96)

    def test_mask2former(self, config):
        from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation

        sizes = dict(hidden_dim=32, mask_feature_size=32, feature_size=32, encoder_feedforward_dim=32, dim_feedforward=32)
        layers = dict(encoder_layers=1, decoder_layers=2, num_attention_heads=2, num_queries=8, train_num_points=64, num_labels=5)
        model = Mask2FormerForUniversalSegmentation(Mask2FormerConfig(backbone_config=config, **sizes, **layers))
        labels = [torch.arange(5)] * 2
        masks = [torch.stack([(mask == label).float() for label in range(5)]) for mask in MASKS]
        step(model, lambda: model(IMAGES, mask_labels=masks, class_labels=labels).loss)
        assert model.eval()(IMAGES).masks_queries_logits.shape == (2, 8, 16, 24)

    def test_detr(self, config):
        from transformers import DetrConfig, DetrForObjectDetection

        sizes = dict(d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=32, decoder_ffn_dim=32, num_queries=6, num_labels=5)
        heads = dict(encoder_attention_heads=2, decoder_attention_heads=2)
        model = DetrForObjectDetection(DetrConfig(backbone_config=config, **sizes, **heads))
        labels = [dict(class_labels=torch.tensor([1]), boxes=torch.tensor([[0.5, 0.5, 0.2, 0.3]]))] * 2
        step(model, lambda: model(IMAGES, labels=labels).loss)
        assert model.eval()(IMAGES).pred_boxes.shape == (2, 6, 4)


def test_torchvision_by_hand():
    backbone = timm.create_model("debiformer_nano", features_only=True)
    levels = {str(index): str(index) for index in range(4)}

    class Maps(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.out_channels = backbone, 16
            self.fpn = BackboneWithFPN(torch.nn.ModuleDict(), {}, backbone.feature_info.channels(), 16).fpn

        def forward(self, images):
            return self.fpn(dict(zip(levels, self.body(images), strict=True)))

    model = FasterRCNN(Maps(), num_classes=3, min_size=64, max_size=96)
    targets = [dict(boxes=torch.tensor([[10.0, 10, 60, 50]]), labels=torch.tensor([2]))] * 2
    step(model, lambda: sum(model(list(IMAGES), targets).values()))
    assert len(model.eval()(list(IMAGES))) == 2
    assert Backbone("debiformer_nano").channels == backbone.feature_info.channels()
