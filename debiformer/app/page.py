"""The page of the explorer: its controls, and what each of them does."""

import json
import traceback
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image, ImageDraw

from ..explain.evidence import Evidence, UnknownClass, arrays, evidence, evidence_figure, evidence_panels
from ..explain.grad_cam import METHODS
from ..explain.path import path_figure, path_panels
from ..explain.views import NothingFound, View
from .explorer import Explorer, bundled
from .panels import STYLE, Section, drawn

PACKAGE = Path(__file__).parents[1]
UPLOAD = "20mb"  # at most
WAITING = 32  # requests at most
SESSIONS = 100  # visitors whose choices are kept
KEPT = 3600  # seconds that uploads and what is made of them stay on the disk
HIGH = 150  # pixels of what the page begins with
SHOWN = 640  # pixels of the longer side of the picture on the page
ALT = "The picture: click on it, or give a pixel by x and y below"
NOTHING, FOUND, ALL = "nothing", "what the model finds", "all, averaged"
INTRODUCTION = """# Where does the model look?
A vision model with routing attention gathers what it knows about a pixel from a few places in the picture.
**Click on the picture** and see which ones, layer by layer.
"""
# One request at a time uses a model, and of several that come from one page while it is busy the last.
ONE_BY_ONE: dict[str, Any] = dict(concurrency_id="models", concurrency_limit=1, api_visibility="private", trigger_mode="always_last")
THEME = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])  # fonts of the reader's own machine

Asked = dict[Any, Any]  # what every control is set to


class Page:
    """The page over an explorer, as `blocks`; models are offered in the order of the explorer's sources."""

    def __init__(self, explorer: Explorer) -> None:
        self.explorer = explorer
        self.names, self.pictures = list(explorer.sources), [str(file) for file in bundled()]
        with gr.Blocks(title="DeBiFormer explorer", analytics_enabled=False, delete_cache=(KEPT // 6, KEPT)) as self.blocks:
            gr.Markdown(INTRODUCTION)
            self.file, self.size, self.shown = gr.State(), gr.State(), gr.State()
            with gr.Row():
                self._lay_out_sources()
            with gr.Row():
                with gr.Column(scale=1, min_width=300):
                    self._lay_out_picture()
                with gr.Column(scale=3, min_width=300):
                    self._lay_out_results()
            self._wire()

    def _lay_out_sources(self) -> None:
        with gr.Column(scale=1, min_width=260):
            self.model = gr.Dropdown(self.names, value=self.names[0], label="Model", elem_id="model")
            self.other = gr.Dropdown([NOTHING, *self.names], value=NOTHING, label="Compare with", elem_id="other")
        self.upload = gr.File(
            label=f"Your own picture (up to {UPLOAD.upper()})", file_types=["image"], height=HIGH, min_width=260, elem_id="upload"
        )
        still: dict[str, Any] = dict(allow_preview=False, interactive=False, buttons=[])
        samples: dict[str, Any] = dict(label="Or one of these", columns=len(self.pictures), height=HIGH, min_width=260, elem_id="samples")
        self.samples = gr.Gallery(self.pictures, **samples, **still)

    def _lay_out_picture(self) -> None:
        self.picture = gr.Image(label="Click anywhere", interactive=False, buttons=[], elem_id="picture", alt_text=ALT)
        with gr.Row():
            self.x, self.y = (
                gr.Number(label=label, precision=0, minimum=0, min_width=80, elem_id=name)
                for name, label in {"x": "x, from the left", "y": "y, from the top"}.items()
            )
        self.go = gr.Button("Show this pixel", elem_id="go")

    def _lay_out_results(self) -> None:
        with gr.Row():
            self.stage = gr.Dropdown(label="Stage, from fine to coarse", min_width=120, elem_id="stage")
            self.block = gr.Dropdown(label="Block in the stage", min_width=120, elem_id="block")
            self.head = gr.Dropdown(label="Attention head", min_width=120, elem_id="head")
        self.progress = gr.HTML(elem_id="progress", min_height=32)  # apart from the results, which it would cover
        self.results = gr.HTML(elem_id="results", min_height=300, padding=False)
        with gr.Accordion("Evidence: for which class, and how it is found", open=False), gr.Row():
            self.label = gr.Dropdown(label="Class", min_width=160, elem_id="label")
            self.method = gr.Dropdown(list(METHODS), value="grad_cam", label="Method", min_width=160, elem_id="method")
            self.weighed = gr.Dropdown(label="By the map of", min_width=160, elem_id="weighed")
        self.save = gr.Button("Make a file of the figures and arrays", elem_id="save")
        self.saved = gr.File(label="Figures and arrays", interactive=False, visible=False, elem_id="saved")

    def _wire(self) -> None:
        layer, evidence_choice = [self.stage, self.block, self.head], [self.label, self.method, self.weighed]
        self.controls = [self.file, self.model, self.other, self.x, self.y, *layer, *evidence_choice]
        asked: set[Any] = {*self.controls, self.shown}
        show: dict[str, Any] = dict(fn=self.show, inputs=asked, outputs=[self.picture, self.results, self.saved, self.shown], **ONE_BY_ONE)
        show |= dict(show_progress_on=self.progress)
        renewed: dict[str, Any] = dict(
            outputs=[self.file, self.size, self.x, self.y, *layer, self.label, self.weighed], show_progress="hidden"
        )
        renewed |= ONE_BY_ONE

        self.blocks.load(self.begin, asked, **renewed).success(**show)
        self.upload.upload(self.uploaded, asked | {self.upload}, **renewed).success(**show)
        # "always_last" would bring the last click with the place of an earlier one.
        self.samples.select(self.sampled, asked, **renewed | dict(trigger_mode="multiple")).success(**show)
        gr.on([c.change for c in (self.model, self.other, self.stage, self.block)], self.offered, asked, **renewed).success(**show)
        # Past the queue, whose stream of answers may lose one to clicks that follow each other closely.
        at_once: dict[str, Any] = dict(queue=False, trigger_mode="multiple", show_progress="hidden", api_visibility="private")
        self.picture.select(self.clicked, self.size, [self.x, self.y], **at_once).success(**show)
        gr.on([self.go.click, self.x.submit, self.y.submit, self.head.change, *(c.change for c in evidence_choice)], **show)
        self.save.click(self.write, asked, self.saved, **ONE_BY_ONE)

    def begin(self, asked: Asked) -> Asked:
        """The first bundled picture."""
        return self.opened(self.pictures[0], asked)

    def uploaded(self, asked: Asked) -> Asked:
        """The visitor's own picture."""
        return self.opened(asked[self.upload], asked)

    def sampled(self, asked: Asked, event: gr.SelectData) -> Asked:
        """Another bundled picture."""
        return self.opened(self.pictures[event.index], asked)

    def opened(self, file: str, asked: Asked) -> Asked:
        """Take a picture, with its centre for a query, and offer the layers that there are for it."""
        with told():
            width, height = self.explorer.picture(file).size
        of_picture = {self.file: file, self.size: (width, height), self.x: width // 2, self.y: height // 2}
        try:
            return of_picture | self.offered(asked | {self.file: file})
        except gr.Error as error:  # another model may do
            gr.Warning(error.message, duration=10)
            return of_picture

    def offered(self, asked: Asked) -> Asked:
        """The layers, heads and classes that there are, with those that were chosen where they still are."""
        with told():
            if asked[self.file] is None:
                raise ValueError("choose a picture first")
            looks = [self.explorer.view(name, asked[self.file]).look for name in self.chosen(asked)]
        stages = sorted(set.intersection(*({s for s, _ in look.traces} for look in looks)))
        stage = asked[self.stage] if asked[self.stage] in stages else stages[0]
        blocks = sorted(set.intersection(*({b for s, b in look.traces if s == stage} for look in looks)))
        block = asked[self.block] if asked[self.block] in blocks else blocks[-1]
        labels = [FOUND, *self.explorer.view(asked[self.model], asked[self.file]).labels]
        weighed = [("a fine enough one", 0), *((f"stage {s}", s) for s in stages)]
        options = {
            self.head: [ALL, *range(min(look.trace(stage, block).layer.num_heads for look in looks))],
            self.label: labels,
        }
        return {
            self.stage: gr.Dropdown(stages, value=stage),
            self.block: gr.Dropdown(blocks, value=block),
            self.weighed: gr.Dropdown(weighed, value=asked[self.weighed] if asked[self.weighed] in stages else 0),
            **{
                control: gr.Dropdown(there, value=asked[control] if asked[control] in there else there[0])
                for control, there in options.items()
            },
        }

    def clicked(self, size: tuple[int, int], event: gr.SelectData) -> tuple[int, int]:
        """The pixel of a picture of this width and height under a click on it as it is shown."""
        factor = SHOWN / max(size)
        x, y = (min(int(at / factor), side - 1) for at, side in zip(event.index, size, strict=True))
        return x, y

    def show(self, asked: Asked, progress: Any = gr.Progress()) -> Iterator[Asked]:  # noqa: B008
        """The query on the picture, then its path through each model, then the evidence."""
        names, file = self.chosen(asked), asked[self.file]
        shown = tuple(asked[control] for control in self.controls)
        # Menus change by choice, and again when the page says what there is to choose, one after the other.
        if shown == asked[self.shown] or None in self.layer(asked):
            yield {self.shown: asked[self.shown]}
            return
        with told():
            progress(0, desc=f"{' and '.join(names)} and the picture")
            places = {name: self.place(self.explorer.view(name, file), asked) for name in names}
            picture = marked(self.explorer.picture(file), asked[self.x], asked[self.y])
            yield {self.picture: picture, self.saved: gr.File(visible=False), self.shown: None}
            sections: dict[str, Section] = {}
            for name in names:
                progress((len(sections), 2 * len(names)), desc=f"{name} looks at the picture")
                view, layer = self.explorer.view(name, file), self.layer(asked)
                panels = path_panels(view.look, *layer, *places[name], self.head_of(asked))
                kind = type(view.look.trace(*layer).layer).__name__
                heads = "all heads averaged" if asked[self.head] == ALL else f"head {asked[self.head]}"
                title = "Stage {}, block {}: {}, {}".format(*layer, kind, heads)
                sections[name] = Section(name, self.explorer.findings(name, file), title, [drawn(panel) for panel in panels])
                yield {self.results: "".join(part.html() for part in sections.values())}
            for number, name in enumerate(names, len(names)):
                progress((number, 2 * len(names)), desc=f"the evidence in {name}")
                view = self.explorer.view(name, file)
                try:
                    found = self.evidence(view, places[name], asked)
                except (NothingFound, UnknownClass) as error:  # of two models, one may not know the class
                    sections[name].note = f"No evidence to show: {error}."
                else:
                    sections[name].evidence = [drawn(panel) for panel in evidence_panels(view, found)]
            yield {self.results: "".join(part.html() for part in sections.values()), self.shown: shown}

    def write(self, asked: Asked) -> Iterator[Asked]:
        """The figures and arrays of what is shown in one file, with a note of what they are of."""
        if asked[self.shown] is None:
            raise gr.Error("There is nothing to write yet.", print_exception=False)
        asked = dict(zip(self.controls, asked[self.shown], strict=True))
        with told(), TemporaryDirectory() as folder:
            archive = Path(folder) / "explained.zip"
            with zipfile.ZipFile(archive, "w") as files:
                for number, name in enumerate(self.chosen(asked), 1):
                    view = self.explorer.view(name, asked[self.file])
                    place = self.place(view, asked)
                    query = (*self.layer(asked), *place, self.head_of(asked))
                    about = {"model": name, "picture": Path(asked[self.file]).name, "x": asked[self.x], "y": asked[self.y]}
                    about |= {"stage": query[0], "block": query[1], "head": query[-1]}
                    figures = {"attention": path_figure(view.look, *query)}
                    found: Evidence | None = None
                    try:
                        found = self.evidence(view, place, asked)
                    except (NothingFound, UnknownClass) as error:
                        about["evidence"] = f"none: {error}"
                    else:
                        about["evidence"] = f"{found.method}: {found.name}"
                        figures["evidence"] = evidence_figure(view, found)
                    for title, figure in figures.items():
                        with files.open(f"model-{number}/{title}.png", "w") as content:
                            figure.savefig(content, dpi=130)
                    with files.open(f"model-{number}/arrays.npz", "w") as content:
                        np.savez(content, **arrays(view, *query, found))  # type: ignore[arg-type]
                    files.writestr(f"model-{number}/about.json", json.dumps(about, indent=2) + "\n")
            yield {self.saved: gr.File(str(archive), visible=True)}  # gradio copies it before the folder goes

    def chosen(self, asked: Asked) -> list[str]:
        """The models to show."""
        return [asked[self.model], *({asked[self.other]} - {NOTHING, asked[self.model]})]

    def layer(self, asked: Asked) -> tuple[int, int]:
        """Stage and block."""
        return asked[self.stage], asked[self.block]

    def head_of(self, asked: Asked) -> int | None:
        """The attention head; None for all."""
        return None if asked[self.head] == ALL else asked[self.head]

    def place(self, view: View, asked: Asked) -> tuple[float, float]:
        """Where the query lies in the picture as a model sees it.

        Raises:
            ValueError: If it does not.
        """
        if asked[self.x] is None or asked[self.y] is None:
            raise ValueError("give both x and y, in pixels of the picture")
        return view.place(asked[self.x], asked[self.y])

    def evidence(self, view: View, place: tuple[float, float], asked: Asked) -> Evidence:
        """The evidence of the class, by the method and the map that are chosen."""
        label = None if asked[self.label] == FOUND else asked[self.label]
        return evidence(view, *place, label, asked[self.method], asked[self.weighed] or None)


@contextmanager
def told() -> Iterator[None]:
    """What this library says to visitors is shown on the page; an error of any other origin is a defect, and goes to the terminal too.

    Raises:
        gr.Error: For a ValueError.
    """
    try:
        yield
    except ValueError as error:
        ours = Path(traceback.extract_tb(error.__traceback__)[-1].filename).is_relative_to(PACKAGE)
        raise gr.Error(str(error), duration=10, print_exception=not ours) from error


def marked(image: Image.Image, x: float, y: float) -> Image.Image:
    """The picture at the size that it is shown at, with a star on a pixel."""
    factor = SHOWN / max(image.size)
    width, height = (max(round(side * factor), 1) for side in image.size)
    shown = image.resize((width, height), Image.Resampling.BICUBIC)
    angles = np.arange(10) * np.pi / 5
    radii = np.where(np.arange(10) % 2, 6, 15)
    corners = zip((x + 0.5) * factor + radii * np.sin(angles), (y + 0.5) * factor - radii * np.cos(angles), strict=True)
    ImageDraw.Draw(shown).polygon([*corners], fill="#F0E442", outline="black", width=2)
    return shown


def launch(page: Page, address: str, port: int, **options: Any) -> str:
    """Serve a page, and return where; `options` go to gradio's `launch`.

    Raises:
        OSError: If the port is taken.
    """
    page.blocks.queue(max_size=WAITING)
    _, url, _ = page.blocks.launch(
        server_name=address,
        server_port=port,
        share=False,
        quiet=True,
        show_error=True,
        max_file_size=UPLOAD,
        state_session_capacity=SESSIONS,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        theme=THEME,
        css=STYLE,
        prevent_thread_lock=True,
        **options,
    )
    return url
