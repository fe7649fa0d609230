"""What the explorer keeps between clicks: the models that it offers, the pictures, and each picture through each model."""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from ..data.blood_cells import SAMPLE, whole_images
from ..data.images import UnreadableImage, read_image
from ..explain.views import View
from .seeing import Findings, Model

T = TypeVar("T")
LONG_SIDE = 1280  # pixels; larger pictures are reduced to it, which bounds memory and time
PIXELS, THIN = 50_000_000, 20  # at most, and of one side to the other
MODELS, PICTURES, VIEWS = 3, 16, 8  # kept, those used last


class Recent:
    """The values used last, made when they are asked for."""

    def __init__(self, size: int) -> None:
        self.size, self.values = size, OrderedDict[Hashable, object]()

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """The value of a key, made anew where it is not kept."""
        value = self.values.pop(key) if key in self.values else make()
        self.values[key] = value
        while len(self.values) > self.size:
            self.values.popitem(last=False)
        return value  # type: ignore[return-value]

    def drop(self, chosen: Callable[[Any], bool]) -> None:
        """Forget the values whose keys are chosen."""
        for key in [*filter(chosen, self.values)]:
            del self.values[key]


class Explorer:
    """Models by name, and pictures by file; one request at a time may use it.

    Args:
        sources: What loads each model, by the name that is shown.
    """

    def __init__(self, sources: Mapping[str, Callable[[], Model]]) -> None:
        self.sources = dict(sources)
        self._models, self._pictures, self._views = Recent(MODELS), Recent(PICTURES), Recent(VIEWS)

    def model(self, name: str) -> Model:
        """A model, loaded when it is first asked for; raises what loading it raises."""
        model = self._models.get(name, self.sources[name])
        self._views.drop(lambda key: key[0] not in self._models.values)  # a view holds its model
        return model

    def picture(self, file: str) -> Image.Image:
        """A picture, reduced to `LONG_SIDE`.

        Raises:
            ValueError: If the file is none; the message has its name and not where it lies.
        """
        return self._pictures.get(file, lambda: read(Path(file)))

    def view(self, name: str, file: str) -> View:
        """A picture through a model."""
        return self._views.get((name, file), lambda: self.model(name).see(self.picture(file)))

    def findings(self, name: str, file: str) -> Findings:
        """What a model found in a picture."""
        return self.model(name).findings(self.view(name, file))


def read(file: Path) -> Image.Image:
    """See `Explorer.picture`."""
    try:
        with Image.open(file) as opened:
            width, height = opened.size
    except Exception:  # what is wrong with it is told below
        width = height = 1
    if width * height > PIXELS:
        raise ValueError(f"{file.name}: {width}x{height} pixels are more than {PIXELS // 10**6} million: reduce it first")
    if max(width, height) > THIN * min(width, height):
        raise ValueError(f"{file.name}: of {width}x{height} pixels, one side is more than {THIN} times the other: crop it first")
    try:
        image = read_image(file)
    except UnreadableImage as error:
        raise ValueError(str(error).replace(str(file), file.name)) from error
    image.thumbnail((LONG_SIDE, LONG_SIDE), Image.Resampling.BICUBIC)
    return image


def bundled() -> list[Path]:
    """Pictures to begin with: a crop of a blood cell of each class, and two whole fields."""
    crops = [next(iter(sorted((SAMPLE / "test" / name).iterdir()))) for name in ("wbc", "rbc", "platelet")]
    return [*crops, *(file for file, _ in whole_images()[:2])]
