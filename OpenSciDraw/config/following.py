"""Values of a config that follow from others: paths from base_filesys_path, the objective from the model's family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from OpenSciDraw.config.sections import is_path
from OpenSciDraw.registry import TRAIN_ITERATION_FUNCS


def with_base_path(given: dict[str, Any], output_dir: str) -> dict[str, Any]:
    """A copy whose relative paths start from base_filesys_path; `output_dir` is the default of model_output_dir."""
    base = given.get("base_filesys_path", ".")
    root = Path(base).expanduser().absolute() if isinstance(base, str) and base not in ("", ".") else None

    def moved(section: Any, names: tuple[str, ...]) -> Any:
        if not isinstance(section, dict):
            return section
        return {k: str(root / v) if root and k in names and is_path(v) else v for k, v in section.items()}

    if root:
        given = {"model_output_dir": output_dir, **given}
    values: dict[str, Any] = moved(given, ("model_output_dir", "image_output_dir"))
    if root and isinstance(pictures := values.get("validation_images"), list):

        def picture(value: Any) -> Any:
            return [picture(part) for part in value] if isinstance(value, list) else str(root / value) if is_path(value) else value

        values["validation_images"] = picture(pictures)
    for name in ("dataset", "encode", "evaluate", "prefer", "reward"):
        if name in values:
            values[name] = moved(values[name], ("base_dir", "figures", "cache_dir", "features", "judge_instructions"))
    return values


def objective_of(family: str, parquet: bool) -> str:
    """The registered objective of a family: its own name, else 'flow_matching'."""
    wanted = f"{family}_train_iteration_func{'_parquet' if parquet else ''}".replace("_", "").lower()
    names = TRAIN_ITERATION_FUNCS.names()
    return next((name for name in names if name.replace("_", "").lower() == wanted), "flow_matching")
