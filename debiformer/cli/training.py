"""Commands fit, validate and test: Lightning's CLI with recipes by name, one folder per run, and nothing overwritten."""

import argparse
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import Namespace
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from ..data.base import BaseData, IndexedData
from ..nearest import did_you_mean
from ..progress import StopAfter
from ..tasks.checkpointing import LOCK, TEMPORARY, LastCheckpoint, WholeCheckpoints, hold, read_content, verify
from ..tasks.processes import check, prepare, started
from .kinds import KINDS

USAGE = {
    "fit": "debiformer fit --config RECIPE_OR_FILE [--data.root DIR] [--name RUN] [options: see --help]",
    "validate": "debiformer validate --ckpt_path FILE [--config RECIPE_OR_FILE] [--data.root DIR] [options: see --help]",
    "test": "debiformer test --ckpt_path FILE [--config RECIPE_OR_FILE] [--data.root DIR] [options: see --help]",
}
PLACES = {f"data.init_args.{place}" for place in ("path", "root", "train", "train_root", "val", "val_list", "val_root")}  # of images
MAY_CHANGE = PLACES | {  # between two starts of a run: where and how it runs; that batches stay the same, the data module sees to
    "ckpt_path",
    "data.init_args.batch_size",
    "data.init_args.max_damaged",
    "data.init_args.num_workers",
    "model.on_nonfinite",
    "trainer.accelerator",
    "trainer.default_root_dir",
    "trainer.devices",
    "trainer.enable_progress_bar",
    "trainer.log_every_n_steps",
    "trainer.num_nodes",
    "trainer.strategy",
    "checkpoint_minutes",
}


def known_recipes() -> dict[str, Path]:
    """The bundled recipes by name."""
    folder = Path(__file__).parents[1] / "recipes"
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.yaml"))}


def find_recipe(name: str) -> Path:
    """The file of a bundled recipe by name, or any YAML or JSON file by path.

    Raises:
        FileNotFoundError: If there is neither.
    """
    recipes = known_recipes()
    if name in recipes:
        return recipes[name]
    if Path(name).is_file():
        return Path(name)
    known = ", ".join(recipes)
    raise FileNotFoundError(f"--config {name}: no such file, and no such recipe ({known}); {did_you_mean(name, recipes)}")


def fit(arguments: list[str]) -> int:
    """Train."""
    run("fit", arguments)
    return 0


def validate(arguments: list[str]) -> int:
    """Evaluate on the validation images."""
    run("validate", arguments)
    return 0


def test(arguments: list[str]) -> int:
    """Evaluate on the test images."""
    run("test", arguments)
    return 0


def run(command: str, arguments: list[str]) -> "TrainingCLI":
    """Run fit, validate or test with command-line arguments.

    Raises:
        ValueError: If --config or --ckpt_path is needed and missing, or the checkpoint does not fit the data.
        FileNotFoundError: If the recipe, the checkpoint or the run to resume does not exist.
        FileExistsError: If there is something else where the run would be.
    """
    ours = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    ours.add_argument("-c", "--config", action="append", default=[])
    ours.add_argument("--ckpt_path")
    given, rest = ours.parse_known_args(arguments)
    wants_help = any(word == "-h" or (word.startswith("--") and word.split("=")[0].endswith("help")) for word in rest)
    if not wants_help:
        if command != "fit" and not given.ckpt_path:
            raise ValueError(f"debiformer {command} needs --ckpt_path: the best.ckpt or last.ckpt of a run")
        if command != "fit":
            read_content(Path(given.ckpt_path))
            if not given.config:  # a run that trained on part of the images is tested on all, unless the line says otherwise
                given.config = [str(config_of_run(Path(given.ckpt_path)))]
                rest = ["--trainer.limit_val_batches=null", "--trainer.limit_test_batches=null", *rest]
        if not given.config:
            raise ValueError(f"debiformer fit needs --config: a recipe ({', '.join(known_recipes())}) or a YAML file")
    recipes = [find_recipe(name) for name in given.config]
    line = [f"--config={recipe}" for recipe in recipes] + rest + ([f"--ckpt_path={given.ckpt_path}"] if given.ckpt_path else [])
    return TrainingCLI([command, *line], task_of(recipes), run_name=recipes[0].stem if recipes else None)


def task_of(recipes: list[Path]) -> str:
    """The task that recipes are for.

    Raises:
        ValueError: If there is no such task, or a recipe is no mapping.
    """
    task = "classification"
    for recipe in recipes:
        content = yaml.safe_load(recipe.read_text())
        if not isinstance(content, dict):
            raise ValueError(f"--config {recipe}: the file must hold settings, name: value, not {type(content).__name__}")
        task = content.get("task", task)
    if task not in KINDS:
        raise ValueError(f"task={task!r} in --config {', '.join(map(str, recipes))} is none of {', '.join(KINDS)}")
    return task


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted name."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def config_of_run(checkpoint: Path) -> Path:
    """The config that fit wrote beside the folder of its checkpoints; raises a FileNotFoundError where the checkpoint was moved away."""
    config = checkpoint.parent.parent / "config.yaml"
    if not config.is_file():
        raise FileNotFoundError(
            f"there is no {config}, where a run has its config: say with --config which recipe or YAML file names the data"
        )
    return config


class TrainingCLI(LightningCLI):
    """Lightning's CLI with the data's class names and preprocessing linked into the model, and a folder per run."""

    def __init__(self, line: list[str], task: str, run_name: str | None) -> None:
        self.line, self.task, self.kind, self.run_name = line, task, KINDS[task], run_name
        # It means models that fsdp2 spreads, which are refused a running mean.
        warnings.filterwarnings("ignore", message="You're using the WeightAveraging callback with a model that overrides")
        super().__init__(
            self.kind.task,
            LightningDataModule,
            subclass_mode_data=True,
            save_config_callback=None,  # Lightning's writes wherever a logger does; see before_fit
            seed_everything_default=0,
            trainer_defaults={"default_root_dir": "runs"},
            parser_kwargs={"prog": "debiformer", **{name: {"usage": usage} for name, usage in USAGE.items()}},
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,  # the task's arguments are plain, its checkpoint needs no help
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's subcommands but predict, which is a command of its own; evaluation has a report of its own, and no `verbose`."""
        return {name: skipped | {"verbose"} for name, skipped in LightningCLI.subcommands().items() if name != "predict"}

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand != "fit":
            parser.add_argument("--output", type=str | None, help="Folder for what is found. Default: RUN/evaluation/COMMAND.")
            self.kind.add_arguments(parser, subcommand)
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add --name, and link the data into the model."""
        parser.add_argument("--name", type=str | None, help="Name of the run and its folder. Default: the recipe's.")
        parser.add_argument("--task", choices=[self.task], default=self.task, help="What is trained; recipes say it.")
        parser.add_argument("--checkpoint_minutes", type=float, default=10.0, help="Minutes from one last.ckpt to the next.")
        for name in self.kind.from_data:
            parser.link_arguments(f"data.{name}", f"model.{name}", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: object) -> None:
        """Parse the given line; the base class warns wherever sys.argv holds one too."""
        self.config = parser.parse_args(self.line)

    def _parse_ckpt_path(self) -> None:
        """Lightning would merge in the checkpoint's hyperparameters, and stumbles over linked ones; see before_instantiate_classes."""

    def before_instantiate_classes(self) -> None:
        """Settle the run's folder and the checkpoint before any work begins."""
        config = self.config[self.subcommand]
        config.name = config.name or self.run_name
        self.folder = Path(config.trainer.default_root_dir) / config.name
        if self.subcommand != "fit":
            hparams = self.read(config.ckpt_path)["hyper_parameters"]
            given = {word.partition("=")[0] for word in self.line}
            for name in self.kind.architecture:
                if any(word == f"--model.{name}" or word.startswith(f"--model.{name}.") for word in given):
                    rank_zero_warn(f"--model.{name} is left as it is in {config.ckpt_path}: its weights are for {hparams[name]}")
                config.model[name] = hparams[name]
            config.model.pretrained = False
            return
        if config.weights_only is None:
            config.weights_only = True  # a checkpoint of a run holds nothing that needs code to be read
        last = self.folder / "checkpoints" / "last.ckpt"
        if last.is_file():  # also where the run began with another checkpoint
            config.ckpt_path = str(last)
        if config.ckpt_path and "optimizer_states" not in self.read(config.ckpt_path):
            raise ValueError(
                f"--ckpt_path {config.ckpt_path} was averaged or converted, and has no optimizer to go on with: begin a run with its "
                "weights: of a classifier, `debiformer share` makes a folder for --model.model local-dir:FOLDER --model.pretrained true"
            )
        self.check_run()

    def read(self, ckpt_path: str) -> dict[str, Any]:
        """The content of a checkpoint, which must be of this task."""
        return read_content(Path(ckpt_path), self.task)

    @rank_zero_only  # the other processes may start after the first has made the folder
    def check_run(self) -> None:
        """See that the run's folder can be written and, where a run was begun there, that this is the same.

        Raises:
            FileExistsError: If the folder holds something else.
            PermissionError: If it cannot be written.
            ValueError: If the settings are not those that the run began with.
        """
        begun = self.folder / "config.yaml"
        if not begun.is_file():
            if self.folder.exists() and any(file.name != LOCK for file in self.folder.iterdir()):
                raise FileExistsError(f"{self.folder} is no run of debiformer fit, it has no {begun.name}: name another folder with --name")
            existing = next(folder for folder in (self.folder, *self.folder.absolute().parents) if folder.exists())
            try:
                with tempfile.TemporaryFile(dir=existing):
                    pass
            except OSError as error:
                reason = f"{existing} cannot be written: {error.strerror}"
                raise PermissionError(
                    f"no place for the run {self.folder}, {reason}; choose one with --trainer.default_root_dir"
                ) from error
            return
        if not self.has_checkpoints():
            return
        now = _flat(self.settings())
        then = _flat(yaml.safe_load(begun.read_text()))
        differ = [name for name in sorted(then | now) if then.get(name) != now.get(name)]
        for name in PLACES.intersection(differ):
            rank_zero_warn(f"{self.folder} goes on as if the images were the same: {name} was {then.get(name)} and is {now.get(name)}")
        changed = [name for name in differ if name not in MAY_CHANGE]
        if changed:
            told = ", ".join(f"{name} was {then.get(name)} and is {now.get(name)}" for name in changed)
            raise ValueError(
                f"{self.folder} holds a run with other settings: {told}. Go on with those it began with, or begin another run with --name; "
                f"to change them for the rest of this one, edit {begun} too"
            )

    def has_checkpoints(self) -> bool:
        """Whether there is anything in the folder that a run could go on from; a run that failed at its start leaves its settings only."""
        return any((self.folder / "checkpoints").glob("*.ckpt"))

    def settings(self) -> dict[str, Any]:
        """The whole configuration, as YAML has it."""
        return yaml.safe_load(self._parser(self.subcommand).dump(self.config[self.subcommand], skip_unset=False))

    def after_instantiate_classes(self) -> None:
        """Refuse a checkpoint of other classes than the data's, and say where images are prepared otherwise than they were for it."""
        ckpt_path = self.config[self.subcommand].ckpt_path
        if not ckpt_path:
            return
        trained, here = self.read(ckpt_path)["hyper_parameters"], self.model.hparams
        if trained["class_names"] != here["class_names"]:
            raise ValueError(
                f"checkpoint {ckpt_path} was trained on the classes {trained['class_names']}, the data has {here['class_names']}"
            )
        for name in self.kind.from_data[1:]:
            if trained[name] != here[name]:
                rank_zero_warn(f"data.{name} is {here[name]} here; checkpoint {ckpt_path} was trained with {trained[name]}")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """A trainer that logs and saves in the run's folder, unless the recipe says otherwise."""
        config = self.config_init[self.subcommand].trainer
        for name in ("callbacks", "plugins"):
            given = config[name] or []
            config[name] = list(given) if isinstance(given, list) else [given]
        if config.enable_progress_bar is not False and not any(isinstance(c, RichProgressBar) for c in config.callbacks):
            config.callbacks.append(ProgressBar(leave=True))
        launch = started()
        prepare(config, launch)
        if self.subcommand != "fit":
            config.callbacks = [c for c in config.callbacks if not isinstance(c, Checkpoint)]  # nothing is saved here
            kwargs |= dict(logger=False, enable_checkpointing=False)
        else:
            kwargs |= self.log_and_save(config)
        if isinstance(self.config_init[self.subcommand].data, BaseData):
            kwargs["use_distributed_sampler"] = False  # its samplers know the processes
        if config.max_steps != -1:
            config.callbacks.append(StopAfter(config.max_steps))
            config.max_steps, config.max_epochs = -1, config.max_epochs or -1
        trainer = super().instantiate_trainer(**kwargs)
        check(trainer, config, launch)
        return trainer

    def log_and_save(self, config: Namespace) -> dict[str, Any]:
        """Add what saves in the run's folder to the trainer's settings; returns further ones: the folder, and loggers."""
        folder = {"default_root_dir": self.folder}  # where Lightning leaves things of its own
        checkpoints = self.folder / "checkpoints"
        self.best = ModelCheckpoint(checkpoints, "best", monitor=self.kind.monitor, mode="max", enable_version_counter=False)
        last = LastCheckpoint(checkpoints, self.config[self.subcommand].checkpoint_minutes)
        config.callbacks += [self.best, last]
        config.plugins.append(WholeCheckpoints())
        if config.logger is not None:
            return folder
        starts = len(list((self.folder / "csv").glob("*")))  # CSVLogger deletes what an earlier start wrote
        tensorboard = TensorBoardLogger(self.folder, name="", version="", default_hp_metric=False)
        return folder | {"logger": [tensorboard, CSVLogger(self.folder, name="csv", version=starts, flush_logs_every_n_steps=1)]}

    @rank_zero_only
    def before_fit(self) -> None:
        """Keep the settings, which tell a run from another and from anything else: whole, and before other files are there."""
        self.held = hold(self.folder)
        print(f"classes     {listed(self.model.hparams['class_names'])}")
        if self.config[self.subcommand].ckpt_path:
            print(f"goes on     from {self.config[self.subcommand].ckpt_path}; another run takes another --name")
        config = self.folder / "config.yaml"
        if not config.is_file() or not self.has_checkpoints():
            self.folder.mkdir(parents=True, exist_ok=True)
            unfinished = config.with_name("config.yaml" + TEMPORARY)
            unfinished.write_text(yaml.safe_dump(self.settings(), sort_keys=False))
            unfinished.replace(config)

    def validate(self, **_: Any) -> None:
        """Evaluate the weights of a checkpoint on the validation images."""
        self.evaluate("validate")

    def test(self, **_: Any) -> None:
        """Evaluate the weights of a checkpoint on the test images."""
        self.evaluate("test")

    def evaluate(self, command: str) -> None:
        """Validate or test, and report."""
        self.load_weights(self.config[command].ckpt_path)
        self.kind.report(self.trainer, self.model, self.datamodule, command, self.config[command], self.settings()["data"])

    def load_weights(self, ckpt_path: str) -> None:
        """Take the weights and nothing else: Lightning would restore the callbacks of the training too."""
        verify(Path(ckpt_path))
        self.model.load_state_dict(torch.load(ckpt_path, map_location="cpu", weights_only=True)["state_dict"])

    @rank_zero_only
    def after_fit(self) -> None:
        """Say where things are and what to do with them."""
        best = self.folder / "checkpoints" / "best.ckpt"
        if self.best.best_model_score is None:
            if best.with_name("last.ckpt").is_file():  # fast_dev_run saves nothing
                print(f"last        {best.with_name('last.ckpt')}; there was no validation, and so no best.ckpt")
            return
        print(f"best        {best} ({self.kind.monitor} {self.best.best_model_score:.4f})")
        print(f"last        {best.with_name('last.ckpt')}")
        print(f"curves      tensorboard --logdir {self.folder}")
        command = "validate" if isinstance(self.datamodule, IndexedData) and not self.datamodule.has("test") else "test"
        print(f"to test     debiformer {command} --ckpt_path {best}")
        print(f"to predict  debiformer predict --checkpoint {best} IMAGE_OR_FOLDER")


def listed(names: Sequence[str], most: int = 10) -> str:
    """How many names there are, and the first of them."""
    return f"{len(names)}: {', '.join(names[:most])}{' ...' if len(names) > most else ''}"


class ProgressBar(RichProgressBar):
    """Lightning's, without the version number of a logger."""

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict:
        """The logged metrics."""
        return {name: value for name, value in super().get_metrics(trainer, pl_module).items() if name != "v_num"}
