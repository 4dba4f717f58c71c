"""TikZ and its like, compiled alone to a PDF by the TeX engine that is there. The source is not trusted."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

from OpenSciDraw.prepare.render import RejectedPicture

ENGINES = ("pdflatex", "lualatex", "xelatex", "tectonic")
_BORDER = "4pt"
_HARMLESS = {  # TeX reads and writes nothing outside of its folder and runs no program
    "openin_any": "p", "openout_any": "p", "shell_escape": "f", "TEXMFOUTPUT": ".", "max_print_line": "1000",
}  # fmt: skip
_BAD = re.compile(r"\\(?:write18|immediate\s*\\write|openout|directlua|luaexec|ShellEscape)(?![A-Za-z])")
_NOT_ALONE = re.compile(
    r"(geometry|fancyhdr|titlesec|hyperref|natbib|biblatex|cleveref|inputenc|lineno|caption|subcaption|algorithm\w*)"
)
_PACKAGE = re.compile(r"\\usepackage\s*(?:\[[^\]]*\])?\s*\{([^{}]*)\}")


def find_tex_engine() -> str | None:
    """The TeX engine that compiles pictures; None when there is none."""
    return next((engine for engine in ENGINES if shutil.which(engine)), None)


def compile_tikz(source: str, preamble: str, inputs: Path, folder: Path, seconds: float) -> Path:
    """The PDF of a picture. `inputs` is where files that it reads may lie, `folder` where it is compiled.

    Raises:
        RejectedPicture: no TeX engine, an error in the source, too slow.
    """
    engine = find_tex_engine()
    if engine is None:
        raise RejectedPicture(f"TikZ: no TeX engine here ({', '.join(ENGINES)}): install one to have it drawn")
    if _BAD.search(source) or _BAD.search(preamble):
        raise RejectedPicture("TikZ: its source writes files or runs programs: not compiled")
    folder.mkdir(parents=True, exist_ok=True)
    name = f"tikz{sum(1 for _ in folder.glob('tikz*.tex'))}"
    (folder / f"{name}.tex").write_text(_document(source, preamble), encoding="utf-8", errors="replace")
    environment = {**os.environ, **_HARMLESS, "TEXINPUTS": f".:{inputs}//:"}
    flags = ["--untrusted", f"{name}.tex"] if engine == "tectonic" else [
        "-no-shell-escape", "-interaction=nonstopmode", "-halt-on-error", f"{name}.tex"]  # fmt: skip
    try:
        done = subprocess.run(
            [engine, *flags], cwd=folder, env=environment, timeout=seconds, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise RejectedPicture(f"TikZ: {engine} was not done after {seconds:.0f} s") from error
    pdf = folder / f"{name}.pdf"
    if not pdf.exists() or done.returncode:
        lines = done.stdout.decode("utf-8", "replace").splitlines()
        wrong = next((line for line in lines if line.startswith("!")), f"{engine} ended with {done.returncode}")
        raise RejectedPicture(f"TikZ: {wrong.lstrip('! ')[:300]}")
    return pdf


def _document(source: str, preamble: str) -> str:
    """A page of exactly the picture's size (standalone), or a plain article where that class is missing."""
    kept = _PACKAGE.sub(lambda m: "" if _NOT_ALONE.fullmatch(m[1].strip()) else m[0], preamble)
    return "\n".join([
        rf"\documentclass[border={_BORDER},varwidth=40cm]{{standalone}}",
        r"\usepackage{amsmath,amssymb,tikz}",
        r"\makeatletter\@ifundefined{textwidth}{}{\setlength{\textwidth}{16cm}\setlength{\linewidth}{16cm}\setlength{\columnwidth}{16cm}}",
        r"\makeatother",
        kept,
        r"\begin{document}",
        source,
        r"\end{document}",
    ])  # fmt: skip
