"""Registries know their names without importing anything, and find new files by themselves."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from OpenSciDraw.errors import UserError
from OpenSciDraw.registry import DATASETS, MODELS, SAMPLERS, TRAIN_ITERATION_FUNCS, VALIDATION_FUNCS, Registry

MakeRegistry = Callable[[dict[str, str]], Registry]


@pytest.fixture
def make_registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> MakeRegistry:
    """A registry over a package of the given files, in a place of its own."""
    package = f"plants_{abs(hash(request.node.name))}"

    def make(files: dict[str, str]) -> Registry:
        folder = tmp_path / package / "kinds"
        folder.mkdir(parents=True, exist_ok=True)
        head = "from OpenSciDraw.registry import Registry\n"
        (tmp_path / package / "__init__.py").write_text(
            f"{head}PLANTS = Registry('plant', 'PLANTS', '{package}.kinds')\n"
        )
        (folder / "__init__.py").write_text("")
        for name, text in files.items():
            (folder / name).write_text(text.replace("PACKAGE", package))
        monkeypatch.syspath_prepend(str(tmp_path))
        module = __import__(package)
        registry = module.PLANTS
        assert isinstance(registry, Registry)
        return registry

    return make


OAK = """from PACKAGE import PLANTS

@PLANTS.register('Oak', 'Quercus')
class Oak:
    height = 'tall'
    roots: str = 'deep'
"""
BROKEN_AT_IMPORT = "raise RuntimeError('imported')\n@PLANTS.register('Thorn')\ndef thorn(): ...\n"


def test_a_new_file_is_found_without_an_edit_elsewhere_and_imported_only_when_asked_for(
    make_registry: MakeRegistry,
) -> None:
    plants = make_registry({"oak.py": OAK, "thorn.py": BROKEN_AT_IMPORT})
    assert plants.names() == ["Oak", "Quercus", "Thorn"]
    oak = plants.get("Oak")
    assert oak.__name__ == "Oak"
    assert plants.get("Quercus") is oak
    with pytest.raises(RuntimeError, match="imported"):
        plants.get("Thorn")


def test_class_constants_are_read_without_importing(make_registry: MakeRegistry) -> None:
    plants = make_registry({"oak.py": OAK, "thorn.py": BROKEN_AT_IMPORT})
    assert plants.class_literal("Oak", "height") == "tall"
    assert plants.class_literal("Quercus", "roots") == "deep"
    assert plants.class_literal("Oak", "colour") is None
    assert plants.class_literal("Thorn", "height") is None


def test_an_unknown_name_is_refused_with_the_known_ones_and_the_nearest(make_registry: MakeRegistry) -> None:
    plants = make_registry({"oak.py": OAK})
    with pytest.raises(UserError, match=r"Unknown plant 'oack'. Known: Oak, Quercus. Did you mean 'Oak'\?"):
        plants.get("oack")
    assert "Did you mean" not in (plants.problem("zzzzzz") or "")


def test_two_files_cannot_claim_one_name(make_registry: MakeRegistry) -> None:
    plants = make_registry({"a.py": OAK, "b.py": OAK})
    with pytest.raises(UserError, match=r"'Oak' is registered twice: in .*a\.py:4 and in .*b\.py:4"):
        plants.names()


def test_a_name_that_is_no_literal_is_refused_with_its_line(make_registry: MakeRegistry) -> None:
    plants = make_registry({"a.py": "NAME = 'x'\n@PLANTS.register(NAME)\nclass A: ...\n"})
    with pytest.raises(UserError, match=r"a\.py:2: PLANTS.register takes names as string literals"):
        plants.names()


def test_a_file_that_is_not_python_is_named_with_its_line(make_registry: MakeRegistry) -> None:
    plants = make_registry({"a.py": "x = 1\n@PLANTS.register('A')\nclass A(:\n"})
    with pytest.raises(UserError, match=r"a\.py:3"):
        plants.names()


def test_objects_can_be_registered_from_anywhere_once() -> None:
    registry = Registry("thing", "THINGS", "OpenSciDraw.models")

    @registry.register("One", "Uno")
    def one() -> int:
        return 1

    assert registry.get("Uno") is one
    assert registry.register("One")(one) is one  # the same object again is no conflict
    with pytest.raises(UserError, match="registered twice"):
        registry.register("One")(lambda: 2)
    with pytest.raises(UserError, match="at least one name"):
        registry.register()


@pytest.mark.parametrize(
    ("registry", "documented"),
    [
        (MODELS, {"Flux2Klein"}),
        (DATASETS, {"ArXiVParquetDataset", "ArXiVParquetDatasetV2", "ArXiVParquetDatasetV3", "FigureDataset"}),
        (SAMPLERS, {"ArXiVMixScaleBatchSampler", *(f"DistributedBucketSampler{end}" for end in ("", "V2", "V3"))}),
        (
            TRAIN_ITERATION_FUNCS,
            {
                "Flux2Klein_train_iteration_func_parquet", "Flux2Klein_train_iteration_func",
                "Flux2Klein_fulltune_train_iteration", "Qwen_Image_train_iteration_func_parquet",
                "Qwen_Image_train_iteration_func", "QwenImage_fulltune_train_iteration",
            },
        ),
        (
            VALIDATION_FUNCS,
            {
                "generic_validation_func", "QwenImage_validation_func", "Flux2Klein_fulltune_validation_func",
                "Flux2Klein_fulltune_validation_func_parquet", "QwenImage_fulltune_validation_func",
                "QwenImage_fulltune_validation_func_parquet",
            },
        ),
    ],
    ids=["models", "datasets", "samplers", "train_iteration_funcs", "validation_funcs"],
)  # fmt: skip
def test_every_documented_name_is_registered(registry: Registry, documented: set[str]) -> None:
    assert documented <= set(registry.names())


def test_names_are_known_without_torch() -> None:
    code = (
        "import sys; from OpenSciDraw import registry as r\n"
        "every = (r.MODELS, r.DATASETS, r.SAMPLERS, r.TRAIN_ITERATION_FUNCS, r.VALIDATION_FUNCS)\n"
        "assert all(one.names() for one in every)\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=20)
