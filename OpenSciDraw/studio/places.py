"""Paths in the studio's folder: what lies outside of it, by `..`, by a link or by a config's words, is not there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from OpenSciDraw.config import Config
from OpenSciDraw.errors import UserError
from OpenSciDraw.reporting.run_data import is_run
from OpenSciDraw.studio import saved
from OpenSciDraw.utils.files import is_remote, make_folder, real

OWN = ".studio"  # the studio's own files: queue, caches, drawn pictures
CONFIGS = "configs"  # configs that were made on the page
_LEVELS, _MOST_FOLDERS = 4, 5000


class Places:
    """`root` is the folder that was given, without links."""

    def __init__(self, root: Path):
        self.root = real(root)
        if not self.root.is_dir():
            raise UserError(f"{root} is no folder. Give the folder that holds figures, stores and runs.")
        self.own = make_folder(self.root / OWN)

    def has(self, path: Path) -> bool:
        """Whether a path, followed to its end, lies in the folder."""
        found = real(path)
        return found == self.root or self.root in found.parents

    def inside(self, relative: str) -> Path:
        """The path of something in the folder, as the page names it: 'runs/demo'.

        Raises:
            UserError: absolute, with .. or a name that begins with a dot, or a link that leads out of the folder.
        """
        parts = relative.split("/")
        plain = all(part and not part.startswith(".") and "\\" not in part and "\0" not in part for part in parts)
        if relative in ("", "."):
            return self.root
        path = self.root.joinpath(*parts) if plain and not os.path.isabs(relative) else None
        if path is None or not self.has(path):
            raise UserError(f"{relative!r:.200} is not in the studio's folder. Name something inside it, such as 'runs/demo'.")
        return path

    def name(self, path: Path) -> str:
        """The name by which the page knows a path: relative to the folder, with / between."""
        return path.relative_to(self.root).as_posix()

    def folders(self) -> Iterator[Path]:
        """The folder and those below it, without hidden ones and links; into runs, checkpoints and stores nobody looks."""
        level, seen = [self.root], 0
        for _ in range(_LEVELS):
            yield from level
            seen += len(level)
            deeper: list[Path] = []
            for folder in level:
                if folder != self.root and (is_run(folder) or any(folder.glob("figures/*.index.arrow"))):
                    continue
                with os.scandir(folder) as found:
                    names = sorted(e.name for e in found if e.is_dir(follow_symlinks=False) and not e.name.startswith("."))
                deeper += [folder / name for name in names]
            level = deeper[: max(0, _MOST_FOLDERS - seen)]

    def runs(self) -> list[Path]:
        """Run folders: the folder is the state, so a run that was started in a shell is one of them."""
        return sorted((folder for folder in self.folders() if is_run(folder)), key=self.name)

    def run(self, name: str) -> Path:
        """Raises UserError where there is no such run."""
        folder = self.inside(name)
        if not is_run(folder):
            raise UserError(f"{name!r} is no run: there is no config.py with metrics.jsonl or run.json in it.")
        return folder

    def file(self, folder: Path, name: str) -> Path | None:
        """A file of a folder, where it is one and no link leads it out of the studio's folder."""
        path = folder / name
        return path if path.is_file() and self.has(path) else None

    def configs(self) -> list[Path]:
        """Configs as they are saved (values alone): of runs, and those made on the page."""
        made = self.root / CONFIGS
        own = sorted(path for path in made.glob("*.py") if self.has(path)) if made.is_dir() and self.has(made) else []
        return [*own, *(run / "config.py" for run in self.runs() if self.has(run / "config.py"))]

    def config(self, name: str, overrides: list[str] | None = None) -> Config:
        """A saved config, read as values and never run. Raises UserError as `saved.load`."""
        return saved.load(self.inside(name), overrides or [])

    def require_inside(self, config: Config) -> None:
        """Raises UserError when a config reads figures from, or writes to, somewhere outside of the folder."""
        data, given = config.dataset, [[item] if isinstance(item, str) else item or [] for item in config.validation_images]
        pictures = [picture for several in given for picture in several]
        named = [
            ("model_output_dir", config.model_output_dir), ("image_output_dir", config.image_output_dir),
            ("logging_dir", str(Path(config.model_output_dir) / config.logging_dir)), ("cache_dir", config.cache_dir),
            ("encode.figures", config.encode.figures), ("evaluate.figures", config.evaluate.figures),
            ("prefer.figures", config.prefer.figures), ("dataset.figures", data.figures), ("dataset.cache_dir", data.cache_dir),
            *(("validation_images", picture) for picture in pictures),
        ]  # fmt: skip
        if config.use_parquet_dataset:
            parts = [data.parquet_base_path, data.gen_parquet_path, data.edit_parquet_path, *(one.path for one in data.sources)]
            named += [("dataset.base_dir", f"{data.base_dir.rstrip('/')}/{part}") for part in parts if part is not None]
        wrong = [f"{key} = {value!r}" for key, value in named if value is not None and not self._may(value)]
        if wrong:
            raise UserError(
                f"{'; '.join(wrong)}: outside of the studio's folder {self.root}. Choose a place inside it, or run the command in "
                "a shell, where you may name any."
            )
        if config.push_to_hub:
            raise UserError("push_to_hub = True: the studio uploads nothing. Set it to False, and upload from a shell.")

    def _may(self, value: str) -> bool:
        if value.startswith("drawn:"):
            return True
        return not is_remote(value) and self.has(Path(value).expanduser())
