"""The papers' tables: published numbers as their sources print them, ours, and how each came about."""

import re
from pathlib import Path

import pytest

from debiformer.cli import main, papers, tables
from debiformer.cli.training import known_recipes

PAGE = Path(__file__).parents[1] / "docs" / "tables.md"
READ = {  # the lines of results, without their links
    "DeBiFormer": """
        | DeBiFormer-T | 224x224 | 81.9 | 21.4 M | 2.6 G |
        | DeBiFormer-S | 224x224 | 83.9 | 44 M | 5.4 G |
        | DeBiFormer-B | 224x224 | 84.4 | 77 M | 11.8 G |""",
    "DeBiFormer, ADE20K": """
        | DeBiFormer-B | IN1k | S-FPN | 512x512 | 80K |50.6 | -  |
        | DeBiFormer-B | IN1k | UPerNet | 512x512 | 160K | 51.4 | 52.0 |""",
    "DeBiFormer, COCO": """
        | DeBiFormer-S | IN1k | MaskRCNN | 1x | 47.5 | 42.5 |
        | DeBiFormer-B | IN1k | MaskRCNN | 1x | 48.5 | 43.2 |
        | DeBiFormer-S | IN1k | RetinaNet | 1x | 45.6 | 49.3  |
        | DeBiFormer-B | IN1k | RetinaNet | 1x | 47.1 | 51.1  |""",
    "BiFormer": """
        | BiFormer-T | 224x224 | 81.4 | 13.1 M | 2.2 G |
        | BiFormer-S | 224x224 | 83.8 | 25.5 M | 4.5 G |
        | BiFormer-B | 224x224 | 84.3 | 56.8 M | 9.8 G |
        | BiFormer-STL | 224x224 | 82.7 | 28.4 M | 4.6 G |
        | BiFormer-STL-nchw | 224x224 | 82.7 | 28.4 M | 4.6 G |""",
    "BiFormer, ADE20K": """
        | BiFormer-S | IN1k | S-FPN | 512x512 | 80K | 48.9 | - |
        | BiFormer-B | IN1k | S-FPN | 512x512 | 80K | 49.9 | - |
        | BiFormer-S | IN1k | UPerNet | 512x512 | 160K | 49.8 | 50.8 |
        | BiFormer-B | IN1k | UPerNet | 512x512 | 160K | 51.0 | 51.7 |""",
    "BiFormer, COCO": """
        | BiFormer-S | IN1k | MaskRCNN | 1x | 47.8 | 43.2 | 48.1 | 43.6 |
        | BiFormer-B | IN1k | MaskRCNN | 1x | 48.6 | 43.7 | - | - |
        | BiFormer-S | IN1k | RetinaNet | 1x | 45.9 | - | 47.3 | - |
        | BiFormer-B | IN1k | RetinaNet | 1x | 47.1 | - |- | - |""",
    "Swin": """
        | Swin-T | ImageNet-1K | 224x224 | 81.2 | 95.5 | 28M | 4.5G |
        | Swin-S | ImageNet-1K | 224x224 | 83.2 | 96.2 | 50M | 8.7G |
        | Swin-B | ImageNet-1K | 224x224 | 83.5 | 96.5 | 88M | 15.4G |
        | Swin-T | Mask R-CNN | ImageNet-1K | 3x | 46.0 | 41.6 | 48M | 267G |
        | Swin-S | Mask R-CNN | ImageNet-1K | 3x | 48.5 | 43.3 | 69M | 359G |
        | Swin-T | UPerNet | ImageNet-1K | 512x512 | 160K | 44.51 | 45.81 | 60M | 945G |
        | Swin-S | UperNet | ImageNet-1K | 512x512 | 160K | 47.64 | 49.47 | 81M | 1038G |
        | Swin-B | UperNet | ImageNet-1K | 512x512 | 160K | 48.13 | 49.72 | 121M | 1188G |""",
    "ConvNeXt": """
        | ConvNeXt-T | 224x224 | 82.1 | 28M | 4.5G |
        | ConvNeXt-S | 224x224 | 83.1 | 50M | 8.7G |
        | ConvNeXt-B | 224x224 | 83.8 | 89M | 15.4G |""",
}
METHODS = {"semantic fpn": "sfpn", "upernet": "upernet", "retinanet": "retinanet", "mask r-cnn": "maskrcnn"}
COLUMNS = {  # counted from the last
    "DeBiFormer": {papers.TOP1: -3, papers.PARAMETERS: -2, papers.MACS: -1},
    "DeBiFormer, ADE20K": {papers.MIOU: -2, papers.MIOU_SCALES: -1},
    "DeBiFormer, COCO": {papers.BOXES: -2, papers.MASKS: -1, papers.MEDIUM: -1},
    "BiFormer": {papers.TOP1: -3, papers.PARAMETERS: -2, papers.MACS: -1},
    "BiFormer, ADE20K": {papers.MIOU: -2, papers.MIOU_SCALES: -1},
    "BiFormer, COCO": {papers.BOXES: -4, papers.MASKS: -3, papers.BOXES_AGAIN: -2, papers.MASKS_AGAIN: -1},
    "Swin": {papers.PARAMETERS: -2, papers.MACS: -1},
    "ConvNeXt": {papers.PARAMETERS: -2, papers.MACS: -1},
}


def printed(source, label, number):
    """What a source prints in the line and the column of a number."""
    name, _, method = label.partition(", ")
    name = name.replace("bi-level routing", "BiFormer-STL")  # the model of that ablation, says the README
    lines = [[cell.strip() for cell in line.strip(" |").split("|")] for line in READ[source].strip().splitlines()]
    lines = [line for line in lines if line[0] == name]
    methods = {METHODS.get(method.lower(), "224x224")}
    (line,) = (line for line in lines if methods & {cell.lower().replace("-", "").replace(" ", "") for cell in line})
    return line[COLUMNS[source][number]].rstrip("MG ")


@pytest.fixture(scope="module")
def found():
    return [(section, section.rows()) for section in tables.SECTIONS]


@pytest.fixture(scope="module")
def rows(found):
    return [row for _, of_section in found for row in of_section]


def test_published_numbers_are_those_of_their_sources(rows):
    published = [row for row in rows if row.published not in ("", "none")]
    assert len(published) == 75
    for row in published:
        assert row.published == printed(row.source, row.model, row.number), row


def test_every_row_says_how_it_was_obtained(rows):
    recipes = known_recipes()
    for row in rows:
        assert re.match("exact$|measured here$|not measured yet|proxy on CIFAR-10|needs (ImageNet|ADE20K|COCO): ", row.how), row
        assert bool(row.ours) != bool(re.search("needs|not measured yet|not run yet", row.how)), row
        assert set(re.findall(r"(?:imagenet1k|ade20k|coco)/\w+", row.how)) <= set(recipes), row
        assert (row.difference == "0") == (row.how == "exact"), row


def test_differences_are_explained(rows):
    assert all(row.note for row in rows if row.difference not in ("", "0"))
    noted = {(row.model, row.number) for row in rows if row.note}
    assert noted == set(papers.NOTES)
    (base,) = (row for row in rows if row.published == "77")
    assert (base.ours, base.difference, base.how) == ("95.502", "+18.502", "measured here")
    assert "95,501,926" in base.note


def test_exact_is_equal_in_every_digit_that_is_printed():
    published = {papers.PARAMETERS: "21.4", papers.MACS: "2.6"}
    parameters, macs = tables.sizes("DeBiFormer-T", (21_495_598, 2_633_522_688.0), published, "DeBiFormer")
    assert (parameters.ours, parameters.difference, parameters.how) == ("21.496", "+0.096", "measured here")
    assert (macs.ours, macs.difference, macs.how) == ("2.634", "0", "exact")
    (alone, _) = tables.sizes("x", (1, 1.0))
    assert (alone.difference, alone.how, alone.published) == ("", "measured here", "")


def test_runs_on_cifar10_are_averaged():
    runs = [{"model": "a", "seed": i, "epochs": 3.0, "accuracy": accuracy, "params_m": 1.5} for i, accuracy in enumerate((0.5, 0.61))]
    row = tables.proxy("A", runs)
    assert (row.published, row.ours) == ("none", "55.5 (50.0 to 61.0)")
    assert row.how == "proxy on CIFAR-10: 1.50 M parameters, 3 epochs, 2 seeds"
    assert tables.proxy("A", []).how == "proxy on CIFAR-10, not run yet: python benchmarks/cifar10.py table5 makes table5.json"


def test_latencies_are_found_by_their_topk(monkeypatch):
    timed = {"bra_topk": [1, 4, 16, 49], "dbra_topk": [49] * 4, "onnxruntime_ratio": 1.25, "openvino_ratio": 1.125}
    monkeypatch.setattr(papers, "TOPK", (((1, 4, 16, 49), (49, 49, 49, 49)), papers.RELEASED_TOPK))
    monkeypatch.setattr(tables, "results", lambda name: [timed])
    rows = [row for row in tables.topk() if "latency" in row.number]
    assert [row.ours for row in rows] == ["1.25", "1.12", "", ""]
    assert rows[3].how == "not measured yet: python benchmarks/table6.py makes table6.json"


def test_one_table_or_all(capsys):
    assert sorted(number for section in tables.SECTIONS for number in section.tables) == [1, 2, 3, 4, 5, 6, 7]
    assert main(["tables", "7"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("Table 7: patterns of mixers\n")
    assert "B* B* B* ** (released)  parameters, M         not at hand  21.496" in shown
    with pytest.raises(SystemExit):
        main(["tables", "8"])
    assert "invalid choice: 8 (choose from 1, 2, 3, 4, 5, 6, 7)" in capsys.readouterr().err


def test_the_page_is_up_to_date(found):
    assert PAGE.read_text(encoding="utf-8") == tables.page(found) + "\n"
