"""Grad-CAM of BiFormer beside DeBiFormer, the paper's Figure 4 in kind: python scripts/draw_evidence.py BIFORMER.ckpt DEBIFORMER.ckpt PNG

Checkpoints of the bundled cells, trained alike: debiformer fit --config blood_cells --model.model biformer_tiny --data.input_size 96
--trainer.max_epochs 12, and debiformer_tiny.
"""

import sys

from matplotlib.figure import Figure

from debiformer.app.seeing import load_model
from debiformer.data.blood_cells import crop, whole_images
from debiformer.data.images import read_image
from debiformer.explain.evidence import evidence
from debiformer.explain.path import heat, show

STAGES = (3, 4)

if __name__ == "__main__":
    *checkpoints, file = sys.argv[1:]
    models = dict(zip(("BiFormer-T", "DeBiFormer-T"), map(load_model, checkpoints), strict=True))
    pictures = []
    for label, (path, boxes) in zip(("wbc", "platelet", "rbc"), whole_images(), strict=False):
        pictures.append((label, crop(read_image(path), next(box for box in boxes if box.label == label))))
    figure = Figure(figsize=(2.1 * (1 + 2 * len(STAGES)), 2.35 * len(pictures) + 0.5), layout="constrained")
    rows = figure.subplots(len(pictures), 1 + len(models) * len(STAGES))
    for number, ((label, picture), row) in enumerate(zip(pictures, rows, strict=True)):
        panels = iter(row[1:])
        for name, model in models.items():
            view = model.see(picture)
            for stage in STAGES:
                axes = next(panels)
                found = evidence(view, 1, 1, label, "grad_cam", stage)
                heat(axes, view.look, found.activation)
                height, width = view.look.trace(stage, 1).size
                chance = found.name.split(";")[0].rpartition(", ")[2]
                axes.set_xlabel(f"{chance} {label}", fontsize=9)
                if not number:
                    axes.set_title(f"{name}\nstage {stage}, {height}x{width}", fontsize=10)
        show(row[0], view.look.image)
        row[0].set_ylabel(label, fontsize=11)
    rows[0][0].set_title("test crop", fontsize=10)
    figure.suptitle("Grad-CAM: where each model finds the evidence for the cell's class; relative to the brightest", fontsize=11)
    figure.savefig(file, dpi=100)
