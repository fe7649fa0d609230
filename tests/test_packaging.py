"""What is handed out: the wheel and the source archive hold what they must, and what is not installed is asked for by its extra's name."""

import json
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
from importlib.metadata import distributions, packages_distributions
from pathlib import Path
from zipfile import ZipFile

import pytest

from debiformer.cli import COMMANDS, EXTRAS

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LATER = {  # for options rather than commands
    "data": ("webdataset", "datasets", "scipy"),
    "export": ("onnx", "onnxscript", "onnxruntime", "openvino"),
}
RUN = """
import contextlib, io, json, sys
blocked, lines = json.load(sys.stdin)
sys.modules.update(dict.fromkeys(blocked))  # as if they were not installed
import debiformer.cli
loaded, found = [*sys.modules], []
for line in lines:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            code = debiformer.cli.main(line)
        except SystemExit as stop:
            code = stop.code
    found.append((code, said.getvalue()))
json.dump((loaded, found), sys.stdout)
"""


def without(modules, *lines, cwd):
    """The modules of `import debiformer.cli`, and exit code and errors of each command line, where some modules are not installed."""
    said = json.dumps((modules, [list(map(str, line)) for line in lines]))
    run = subprocess.run([sys.executable, "-c", RUN], input=said, capture_output=True, text=True, check=False, cwd=cwd)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def modules_of(extras):
    """Those that extras bring."""
    return {module for extra in extras.values() for module in extra}


def names(requirements):
    """Of distributions, as a registry writes them."""
    return {re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-") for requirement in requirements}


def test_importing_the_package_loads_no_extra(tmp_path):
    loaded, _ = without([], cwd=tmp_path)
    assert not set(loaded) & (modules_of(EXTRAS) | modules_of(LATER) - {"scipy"})  # torch takes scipy if it is there


class TestExtras:
    @pytest.mark.parametrize("extra", [*EXTRAS, *LATER])
    def test_every_requirement_of_an_extra_is_looked_for(self, extra):
        wanted = names(PROJECT["optional-dependencies"][extra])
        if not wanted <= names(distribution.name for distribution in distributions()):
            pytest.skip(f"the extra {extra} is not installed")
        makers = packages_distributions()
        assert {maker for module in (EXTRAS | LATER)[extra] for maker in names(makers[module])} == wanted

    def test_commands_in_an_environment_without_extras(self, tmp_path):
        """As after `pip install debiformer`: nothing else is imported, four commands run, and the others say what they need."""
        alone = {
            "models": (),
            "tables": ("1",),
            "bench": ("debiformer_nano", "--rounds", 1, "--batch-size", 1, "--image-size", 64),
            "convert": ("absent.pth", "x.ckpt"),
        }
        _, found = without([*modules_of(EXTRAS), *modules_of(LATER)], *((name, *alone.get(name, ())) for name in COMMANDS), cwd=tmp_path)
        for (name, command), (code, said) in zip(COMMANDS.items(), found, strict=True):
            if name == "convert":
                assert (code, 'pip install "debiformer[train]"' in said) == (2, True)
            elif name in alone:
                assert code == 0, said
            else:
                assert code == 2
                assert f'pip install "debiformer[{",".join(command.extras)}]"' in said
        assert {name for name, command in COMMANDS.items() if not command.extras} == set(alone)

    def test_options_that_need_more(self, tmp_path):
        for name in ("train/a", "val", "devkit/data"):
            (tmp_path / name).mkdir(parents=True)
        for name in ("train/a/1.JPEG", "val/ILSVRC2012_val_00000001.JPEG", "devkit/data/meta.mat"):
            (tmp_path / name).touch()
        (tmp_path / "devkit/data/ILSVRC2012_validation_ground_truth.txt").write_text("1\n")
        fit = ("fit", "--config", "image_folder", "--data")
        shards = {"train": "a.tar", "val": "b.tar", "train_images": 1, "val_images": 1, "class_names": "[a, b]"}
        lines = {
            (*fit, "debiformer.data.hub.HuggingFaceImages", "--data.path", "x"): "data",
            (*fit, "debiformer.data.shards.TarShards", *(f"--data.{name}={value}" for name, value in shards.items())): "data",
            (*fit, "debiformer.data.imagenet.ImageNet", "--data.root=.", "--data.val_list=devkit"): "data",
            ("export", "x.ckpt", "--format", "onnx"): "export",
            ("export", "x.ckpt", "--format", "openvino"): "export",
        }
        _, found = without([*modules_of(LATER) - {"scipy"}, "scipy.io"], *lines, cwd=tmp_path)  # torchmetrics takes scipy if it is there
        for extra, (code, said) in zip(lines.values(), found, strict=True):
            assert code == 2
            assert f'pip install "debiformer[{extra}]"' in said


def build(source, into, *options):
    """Build without a network."""
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", into, *options, source]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


def files(folder):
    """All files below a folder, relative to it, but for what Python and editors leave behind."""
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {path.as_posix() for path in found if not any(part == "__pycache__" or part.startswith(".") for part in path.parts)}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The source archive, and the wheel that was built from it."""
    pytest.importorskip("build")
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("dist")
    build(ROOT, folder)
    return next(folder.glob("*.tar.gz")), next(folder.glob("*.whl"))


class TestArchives:
    def test_the_wheel_holds_the_package_and_nothing_else(self, built):
        _, wheel = built
        package = {f"debiformer/{name}" for name in files(ROOT / "debiformer")}
        results = {"debiformer/results/table5.json", "debiformer/results/table6.json"}
        held = {name for name in ZipFile(wheel).namelist() if ".dist-info/" not in name}
        assert held == package | results
        assert wheel.stat().st_size < 8e6

    def test_the_source_archive_holds_what_the_tests_need(self, built):
        archive, _ = built
        with tarfile.open(archive) as opened:
            held = {member.name.partition("/")[2] for member in opened.getmembers() if member.isfile()}
        folders = ("benchmarks", "debiformer", "docker", "docs", "scripts", "tests")
        wanted = {f"{folder}/{name}" for folder in folders for name in files(ROOT / folder)}
        assert wanted | {"pyproject.toml", "README.md", "LICENSE", "NOTICE", "Makefile", "mkdocs.yml", ".dockerignore"} <= held
        assert not any(name.startswith(("dist/", "runs/", "site/")) for name in held)
        assert archive.stat().st_size < 15e6

    def test_docker_is_given_what_the_wheel_is_built_from(self, built, tmp_path):
        _, wheel = built
        for line in (ROOT / ".dockerignore").read_text().splitlines():
            if line.startswith("!"):
                source, copy = ROOT / line[1:], tmp_path / "context" / line[1:]
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copytree(source, copy) if source.is_dir() else shutil.copy(source, copy)
        build(tmp_path / "context", tmp_path / "dist", "--wheel")
        (same,) = (tmp_path / "dist").iterdir()
        assert {name for name in ZipFile(same).namelist() if not name.endswith(".pyc")} == set(ZipFile(wheel).namelist())
