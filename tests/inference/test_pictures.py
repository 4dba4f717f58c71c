"""Pictures to edit: fitted into their buckets, and a refusal that says what is wrong with the file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from OpenSciDraw.config import EncodeConfig
from OpenSciDraw.errors import UserError
from OpenSciDraw.inference.pictures import pictures_to_edit
from OpenSciDraw.models.base import ModelSource
from OpenSciDraw.models.flux2_klein import Flux2Klein

MODEL = Flux2Klein(ModelSource("embedded:flux2_klein_tiny_random"), 64, torch.float32)


def test_a_picture_is_fitted_into_its_bucket(tmp_path: Path) -> None:
    file = tmp_path / "wide.png"
    Image.new("RGB", (400, 200), "white").save(file)
    (picture,) = pictures_to_edit([str(file)], MODEL, EncodeConfig(resolution=256), "--image")
    assert picture.size == (352, 176)


def test_a_file_that_is_not_there_is_said_to_be_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as refusal:
        pictures_to_edit(["nope.png"], MODEL, EncodeConfig(), "--image")
    message = str(refusal.value)
    assert message.startswith("--image: there is no file nope.png.")
    assert "Errno" not in message and "Give PNG" not in message


def test_a_file_that_is_no_picture_is_told_the_formats(tmp_path: Path) -> None:
    file = tmp_path / "text.png"
    file.write_text("no picture")
    with pytest.raises(UserError, match="Give PNG, JPEG"):
        pictures_to_edit([str(file)], MODEL, EncodeConfig(), "--image")
