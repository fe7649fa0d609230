"""The results as HTML: every picture with a sentence on what it shows, in a grid that fits a telephone as well as a desk."""

from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from io import BytesIO

from matplotlib.figure import Figure
from PIL.Image import Image

from ..explain.path import Panel
from .seeing import Findings

STYLE = """
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(11.5rem, 45%), 1fr)); gap: 0.75rem; margin: 0.5rem 0 1rem; }
.panels figure { margin: 0; }
.panels img { width: 100%; height: auto; display: block; border-radius: 4px; }
.panels figcaption { font-size: 0.9rem; line-height: 1.35; margin-top: 0.3rem; overflow-wrap: anywhere; }
.shares { list-style: none; padding: 0; margin: 0.25rem 0; max-width: 34rem; }
.shares li { display: grid; grid-template-columns: minmax(0, 10rem) 1fr 3.5rem; gap: 0.6rem; align-items: center; overflow-wrap: anywhere; }
.shares meter { width: 100%; height: 1rem; }
.shares span:last-child { text-align: right; }
#samples .grid-wrap { padding-top: 2rem; }
#samples .grid-container { grid-template-columns: repeat(5, minmax(0, 1fr)); gap: 0.4rem; }
#samples .gallery-item, #samples .thumbnail-item { width: 100%; min-width: 0; height: auto; aspect-ratio: 1; }
#progress { min-height: 2rem; padding: 0; }
h2.model { font-size: 1.15rem; margin: 0.75rem 0 0.25rem; overflow-wrap: anywhere; }
"""
SHARES = 8  # lines at most


@dataclass
class Section:
    """What is shown of one model.

    Attributes:
        name: Of the model.
        findings: What it found in the picture.
        layer: Of the path, in words.
        path: Figures of the path of the query.
        evidence: Figures of the evidence.
        note: A sentence below.
    """

    name: str
    findings: Findings
    layer: str
    path: Sequence[str]
    evidence: Sequence[str] = ()
    note: str = ""

    @cached_property
    def found(self) -> list[str]:
        """The picture of the findings as a figure, where there is one."""
        return [] if self.findings.picture is None else [figure(self.findings.picture, "What the model found, drawn over the picture.")]

    def html(self) -> str:
        """The section of the page."""
        shares = self.findings.shares
        lines = "".join(
            f'<li><span>{escape(label)}</span><meter min="0" max="1" value="{share:.4f}" aria-label="{escape(label)}"></meter>'
            f"<span>{share:.1%}</span></li>"
            for label, share in shares[:SHARES]
        )
        parts = [
            f'<h2 class="model">{escape(self.name)}</h2><p>{escape(self.findings.sentence)}</p>',
            f'<ul class="shares">{lines}</ul>' if lines else "",
            f"<p>and {len(shares) - SHARES} more</p>" if len(shares) > SHARES else "",
            f"<p><strong>{escape(self.layer)}</strong></p>",
            grid(self.path),
            grid([*self.found, *self.evidence]),
            f"<p>{escape(self.note)}</p>" if self.note else "",
        ]
        return f"<section>{''.join(parts)}</section>"


def grid(figures: Sequence[str]) -> str:
    """Figures beside and below each other."""
    return f'<div class="panels">{"".join(figures)}</div>' if figures else ""


def drawn(panel: Panel) -> str:
    """A panel as a figure with its sentence."""
    canvas = Figure(figsize=(3, 3), layout="constrained")
    axes = canvas.subplots()
    panel.draw(axes)
    file = BytesIO()
    canvas.savefig(file, dpi=120, bbox_inches="tight", pad_inches=0.02)
    return _figure(file.getvalue(), "png", panel.title.replace("\n", " "), panel.sentence)


def figure(picture: Image, sentence: str) -> str:
    """A picture as a figure with a sentence."""
    file = BytesIO()
    picture.save(file, "webp", quality=90)
    return _figure(file.getvalue(), "webp", "what the model found", sentence)


def _figure(content: bytes, kind: str, title: str, sentence: str) -> str:
    source = f"data:image/{kind};base64,{b64encode(content).decode()}"
    return f'<figure><img src="{source}" alt="{escape(title)}"><figcaption>{escape(sentence)}</figcaption></figure>'
