"""Command share: a checkpoint as a folder with a model card, which timm and the Hugging Face Hub take."""

import argparse
from pathlib import Path

import yaml

from ..tasks.checkpointing import verify
from ..tasks.prediction import load_classifier, read_run
from ..tasks.sharing import Facts, check_free, check_push, known_metrics, portable, push, save
from .bench import count
from .training import config_of_run, find_recipe


def run(arguments: list[str]) -> int:
    """Write the folder of a checkpoint, and push it where that is asked for.

    Raises:
        FileNotFoundError: If the checkpoint or its run's config is missing.
        FileExistsError: If there is something in the folder.
        ValueError: If the checkpoint or the config will not do.
        OSError: If the folder cannot be written, or the Hub does not take it.
    """
    options = parse(arguments)
    check_free(options.folder)
    content = read_run(options.checkpoint)
    verify(options.checkpoint)
    config = find_recipe(options.config) if options.config else config_of_run(options.checkpoint)
    recipe = yaml.safe_load(config.read_text(encoding="utf-8"))
    if not isinstance(recipe, dict) or "class_path" not in (recipe.get("data") or {}):
        raise ValueError(f"{config} does not say in data.class_path what the model was trained on: give with --config the recipe that does")
    if options.push:
        check_push(options.push)
    hparams = content["hyper_parameters"]
    metrics, outdated = known_metrics(options.checkpoint, content, recipe["data"])
    for file in outdated:
        print(f"left out     {file}: it is older than {options.checkpoint}, evaluate again to have it on the card")
    arguments_of_model = (hparams["model_args"] or {}) | {"num_classes": len(hparams["class_names"])}
    facts = Facts(
        content,
        portable(recipe),
        *count(hparams["model"], hparams["input_size"][1:], arguments_of_model),
        metrics,
        options.license,
        options.notes,
        options.push,
    )
    save(load_classifier(options.checkpoint), options.folder, facts)
    print(f"written      {options.folder}: model.safetensors, config.json, recipe.yaml, and README.md, which you may want to read")
    print(f"in Python    timm.create_model({f'local-dir:{options.folder}'!r}, pretrained=True)")
    print(f"to predict   debiformer predict --checkpoint {options.folder} IMAGE_OR_FOLDER")
    if options.push:
        print(f"pushed       {push(options.folder, options.push, options.private)}")
    return 0


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options of share."""
    parser = argparse.ArgumentParser(prog="debiformer share", description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="best.ckpt or last.ckpt of a run, or a mean of `debiformer average`")
    parser.add_argument("folder", type=Path, help="the folder to make")
    parser.add_argument("--config", help="recipe or YAML file that the model was trained with (default: the config.yaml of its run)")
    parser.add_argument("--license", help="licence of the weights, as the Hub calls it: apache-2.0, cc-by-nc-4.0")
    parser.add_argument("--notes", help="what else the card should say, in Markdown: what the model is for, and what it is not")
    parser.add_argument("--push", metavar="OWNER/NAME", help="upload the folder to this repository of the Hugging Face Hub")
    parser.add_argument("--private", action="store_true", help="with --push: a repository that is made is private")
    options = parser.parse_args(arguments)
    if options.private and not options.push:
        parser.error("--private goes with --push")
    return options
