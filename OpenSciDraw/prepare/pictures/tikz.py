"""TikZ and its like, compiled alone to a PDF by the TeX engine that is there. The source is not trusted."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from OpenSciDraw.prepare.isolation import TooMuch, run_program
from OpenSciDraw.prepare.pictures.picture import RejectedPicture

ENGINES = ("pdflatex", "tectonic")  # not lualatex or xelatex: Lua, and the programs that draw PDF, reach what TeX cannot
_MAX_WRITTEN = 64 * 2**20  # bytes of any file that TeX writes, its log too
_SIDE = "150cm"  # of the page; the picture is cut from it when it is drawn
_PACKAGE = re.compile(r"\\(?:usepackage|RequirePackage)\s*(?:\[([^\]]*)\])?\s*\{([^{}]*)\}(?:\s*\[[^\]]*\])?")
_LEFT_OUT = frozenset(  # packages that change the page, or that a picture has no use for and that often clash
    "geometry fullpage a4wide fancyhdr titlesec hyperref natbib biblatex cleveref lineno caption subcaption subfig "
    "showframe standalone preview inputenc".split()
)  # fmt: skip
_EXTERNAL = re.compile(  # starts another TeX
    r"\\(?:tikzexternalize(?:\s*\[[^\]]*\])?|usetikzlibrary\s*\{\s*external\s*\}|tikzsetexternalprefix\s*\{[^{}]*\})"
)
_PLOTS = re.compile(r"\\begin\s*\{(?:(?:semi)?log(?:log|[xy])?axis|axis|groupplot|polaraxis|ternaryaxis)\}|\\addplot")


def find_tex_engine() -> str | None:
    """The TeX engine that compiles pictures; None when there is none."""
    return next((engine for engine in ENGINES if shutil.which(engine)), None)


def compile_tikz(source: str, preamble: str, inputs: Path, folder: Path, seconds: float) -> Path:
    """The PDF of a picture. `inputs` is where files that it reads may lie, `folder` where it is compiled.

    TeX runs no program, reads by relative names below its folder, `inputs` and its own trees, and writes in `folder`.

    Raises:
        RejectedPicture: no TeX engine, an error in the source, too slow.
    """
    engine = find_tex_engine()
    if engine is None:
        raise RejectedPicture(f"TikZ: no TeX engine here ({' or '.join(ENGINES)}): install one to have it drawn")
    folder.mkdir(parents=True, exist_ok=True)
    name = f"tikz{sum(1 for _ in folder.glob('tikz*.tex'))}"
    (folder / f"{name}.tex").write_text(_document(source, preamble), encoding="utf-8", errors="replace")
    flags = ["--untrusted", "--chatter=minimal"] if engine == "tectonic" else [
        "-no-shell-escape", "-interaction=nonstopmode", "-halt-on-error", "-file-line-error-style"]  # fmt: skip
    command, environment = [engine, *flags, f"{name}.tex"], _environment(inputs)
    try:
        code, printed = run_program(command, seconds=seconds, folder=folder, environment=environment, file_bytes=_MAX_WRITTEN)
    except TooMuch as error:
        raise RejectedPicture(f"TikZ: {engine} was {error}") from error
    pdf = folder / f"{name}.pdf"
    if code or not pdf.exists():
        raise RejectedPicture(f"TikZ: {_what_is_wrong(printed) or f'{engine} ended with {code}'}")
    return pdf


def _environment(inputs: Path) -> dict[str, str]:
    """What TeX gets to see: nothing of the caller's but where programs and TeX's trees are."""
    own = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME") or name.startswith("TEXMF")}
    return {
        **own, "openin_any": "p", "openout_any": "p", "shell_escape": "f", "TEXMFOUTPUT": ".", "max_print_line": "1000",
        "MKTEXPK": "0", "MKTEXTFM": "0", "MKTEXMF": "0",  # kpathsea makes no fonts: that starts programs
        "SOURCE_DATE_EPOCH": "0", "FORCE_SOURCE_DATE": "1",  # \today is the same today and tomorrow
        "TEXINPUTS": f".:{inputs.absolute()}//:",
    }  # fmt: skip


def _what_is_wrong(printed: str) -> str:
    """TeX's first error, with the line that it stands in."""
    lines = printed.splitlines()
    for number, line in enumerate(lines):
        if found := re.match(r"!\s*(.+)|\./\S+?\.tex:\d+:\s*(.+)|error: (.+)", line):
            place = next((text for text in lines[number + 1 : number + 12] if re.match(r"l\.\d+ ", text)), "")
            return f"{found[1] or found[2] or found[3]} {place.partition(' ')[2].strip()}".strip()[:300]
    return ""


def _document(source: str, preamble: str) -> str:
    """The picture alone on a page that is larger than any."""
    wanted = [(found[1], name) for found in _PACKAGE.finditer(preamble) if found[1] for name in _names(found[2])]
    options = [rf"\PassOptionsToPackage{{{given}}}{{{name}}}" for given, name in wanted]  # else what tikz loads itself clashes
    kept = _EXTERNAL.sub("", _PACKAGE.sub(lambda found: _if_there(found[1] or "", found[2]), preamble))
    plots = r"\usepackage{pgfplots}\pgfplotsset{compat=newest}" if _PLOTS.search(source) and "pgfplots" not in kept else ""
    sides = "".join(rf"\{name}={_SIDE}" for name in ("pdfpagewidth", "pdfpageheight"))
    return "\n".join([
        *options,
        r"\documentclass{article}",
        r"\usepackage{amsmath,amssymb,tikz}",
        plots,
        kept,
        r"\pagestyle{empty}\setlength{\parindent}{0pt}",
        rf"\AtBeginDocument{{\setlength{{\textheight}}{{{_SIDE}}}\setlength{{\topmargin}}{{0pt}}\setlength{{\oddsidemargin}}{{0pt}}}}",
        r"\begin{document}",
        # Boxes: a picture of any width is set without being broken; widths relative to the text are those of a column.
        rf"\hsize=16cm\textwidth=16cm\linewidth=16cm\columnwidth=16cm\vsize={_SIDE}{sides}\hfuzz=\maxdimen\vfuzz=\maxdimen",
        r"\setbox0=\hbox{%",
        source,
        r"}\shipout\vbox{\kern2cm\hbox{\kern2cm\box0}}",
        r"\end{document}",
    ])  # fmt: skip


def _if_there(options: str, names: str) -> str:
    """Packages one by one, each only where it is installed: the picture may well do without it."""
    return "".join(rf"\IfFileExists{{{name}.sty}}{{\usepackage[{options}]{{{name}}}}}{{}}" for name in _names(names))


def _names(names: str) -> list[str]:
    return [name for name in (part.strip() for part in names.split(",")) if name and name not in _LEFT_OUT]
