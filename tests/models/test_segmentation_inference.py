"""Whole images: windows, scales and mirrors, against the same done plainly with everything in memory."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from debiformer.models import segmentation_inference
from debiformer.models.segmentation_inference import Inference, fuse, rows_of, segment, slide, starts


@pytest.fixture(scope="module")
def model():
    """Five classes by a convolution that sees the border of its input: a window's logits differ from those of the whole."""
    torch.manual_seed(0)
    return torch.nn.Conv2d(3, 5, 7, padding=3).eval()


@pytest.mark.parametrize(
    ("size", "window", "stride"),
    [((50, 70), 32, 21), ((50, 70), 32, None), ((32, 32), 32, 32), ((20, 90), 32, 10), ((9, 7), 32, 5)],
)
def test_windows_are_averaged(model, size, window, stride):
    image = torch.randn(3, *size)
    stride = stride or 21
    total, count = np.zeros((5, *size)), np.zeros(size)
    for top in {min(y, max(size[0] - window, 0)) for y in range(0, size[0], stride)}:
        for left in {min(x, max(size[1] - window, 0)) for x in range(0, size[1], stride)}:
            at = np.s_[top : top + window, left : left + window]
            with torch.no_grad():
                total[:, *at] += model(image[None, :, *at])[0].double().numpy()
            count[at] += 1
    with torch.no_grad():
        found = torch.cat([band.clone() for band in slide(model, image, window, stride)], dim=1)
    torch.testing.assert_close(found.double(), torch.from_numpy(total / count), rtol=1e-5, atol=1e-5)
    assert torch.equal(segment(model, image, Inference(window=window, stride=stride)), found.argmax(0).to(torch.uint8))


def test_windows_cover_all():
    for length in range(1, 60):
        for stride in range(1, 17):
            begins = starts(length, 16, stride)
            assert set().union(*(range(begin, min(begin + 16, length)) for begin in begins)) == set(range(length))
            assert len(begins) == len(set(begins))


def test_windows_over_a_large_image_hold_one_row_of_them(model):
    seen = []

    def watched(images):
        seen.append(images.shape)
        return model(images)

    bands = slide(watched, torch.zeros(3, 400, 64), 32, 32)
    with torch.no_grad():
        assert next(bands).shape == (5, 32, 64)
    assert seen == [(1, 3, 32, 32)] * 2, "the rows below are not yet computed"


@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_enlarging_in_bands_is_enlarging(rows, monkeypatch):
    monkeypatch.setattr(segmentation_inference, "BAND", rows * 5 * 61)
    logits = torch.randn(5, 12, 17)
    bands = list(fuse([logits], 45, 61))
    assert len(bands) == -(-45 // rows)
    torch.testing.assert_close(torch.cat(bands, dim=1), F.interpolate(logits[None], size=(45, 61), mode="bilinear")[0])
    torch.testing.assert_close(
        rows_of(logits, range(3, 9), 7 * 12, 17), F.interpolate(logits[None], size=(84, 17), mode="bilinear")[0, :, 3:9]
    )


def test_scales_and_mirrors_average_probabilities(model):
    image = torch.randn(3, 40, 60)
    expected = torch.zeros(5, 40, 60)
    with torch.no_grad():
        for size in [(16, 24), (32, 48), (64, 96)]:  # the shorter side at 32, by 0.5, 1 and 2
            scaled = F.interpolate(image[None], size=size, mode="bilinear", antialias=True)
            for mirrored in (False, True):
                logits = model(scaled.flip(-1)).flip(-1) if mirrored else model(scaled)
                expected += F.interpolate(logits, size=(40, 60), mode="bilinear").softmax(1)[0]
    found = segment(model, image, Inference(short_side=32, scales=(0.5, 1.0, 2.0), flip=True))
    assert (found == expected.argmax(0)).float().mean() > 0.999  # but for ties within rounding


@pytest.mark.parametrize(
    ("limits", "expected"),
    [((None, None), (300, 400)), ((150, None), (150, 200)), ((150, 180), (135, 180)), ((None, 200), (150, 200)), ((600, 2048), (600, 800))],
)
def test_sizes(limits, expected):
    assert Inference(*limits).sizes(300, 400) == [expected]
    assert Inference(*limits).sizes(400, 300) == [expected[::-1]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window": 0}, "window=0 is not a number of pixels"),
        ({"window": 32, "stride": 40}, "stride=40 leaves gaps between windows of window=32"),
        ({"stride": 40}, "stride=40 is for windows: set window too"),
        ({"scales": ()}, r"scales=\(\) are not factors above 0"),
        ({"scales": (1.0, 0.0)}, "are not factors above 0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        Inference(**arguments)


def test_half_precision():
    """Which PyTorch cannot resize with antialiasing on a CPU."""
    image = torch.randn(3, 40, 50, dtype=torch.bfloat16)
    found = segment(lambda images: images, image, Inference(short_side=20))
    exact = F.interpolate(image[None].float(), size=(20, 25), mode="bilinear", antialias=True)
    expected = F.interpolate(exact, size=(40, 50), mode="bilinear")[0].argmax(0)
    assert (found == expected).float().mean() > 0.97
