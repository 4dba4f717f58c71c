"""LaTeX sources -> (picture, caption) pairs: each idiom that papers use, by hand-written cases, and a published paper."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from conftest import SHARED

from OpenSciDraw.prepare.latex.caption_text import readable
from OpenSciDraw.prepare.latex.figures import LatexFigure, PaperFigures, read_figures
from OpenSciDraw.prepare.settings import Limits

LIMITS = Limits.model_validate({})
CELERITE = SHARED / "corpora" / "latex" / "celerite"


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder


def document(body: str, preamble: str = "") -> str:
    return f"\\documentclass{{article}}\n{preamble}\n\\begin{{document}}\n{body}\n\\end{{document}}\n"


def pairs(found: PaperFigures, root: Path) -> list[tuple[str, str, str]]:
    """(file or TikZ, caption, the parent's caption) of each picture, in order."""
    return [(name_of(figure, root), figure.caption, figure.parent_caption) for figure in found.figures]


def name_of(figure: LatexFigure, root: Path) -> str:
    if figure.graphic is not None:
        return figure.graphic.relative_to(root.resolve()).as_posix()
    return "TikZ" if figure.tikz is not None else f"({(figure.reason or '').split(':')[0]})"


PICTURES = {f"{name}.png": "" for name in "abcdef"} | {"figs/x.pdf": "", "figs/y.eps": "", "figs/Z.PNG": "", "two words.png": "", "v1.2.pdf": ""}
PICTURES |= {"figs/both.png": "", "figs/both.pdf": "", "figs/under_score.png": "", "figs/inks.pdf_tex": r"\begin{picture}(1,1)\end{picture}"}
PICTURES |= {"figs/plot.tikz": r"\begin{tikzpicture}\draw (0,0)--(1,1);\end{tikzpicture}"}
GAP = "\n\n"
LOREM = "Some words that a paper would say here, for a whole line or even two of them, before anything else comes along."
# name: (preamble, body, expected pairs)
CASES: dict[str, tuple[str, str, list[tuple[str, str, str]]]] = {
    "a figure": ("", r"\begin{figure}\includegraphics[width=\linewidth]{a.png}\caption{One.}\end{figure}", [("a.png", "One.", "")]),
    "starred, caption above, no extension": ("", r"\begin{figure*}\caption{Two}\label{f}\includegraphics*{a}\end{figure*}", [("a.png", "Two", "")]),
    "short and long caption": ("", r"\begin{figure}\includegraphics{a}\caption[Short]{The \textbf{long {one}}.}\end{figure}", [("a.png", "The long one.", "")]),
    "wrapfigure": ("", r"\begin{wrapfigure}{r}{0.4\textwidth}\includegraphics{a}\caption{W}\end{wrapfigure}", [("a.png", "W", "")]),
    "sideways and SC figures": (
        "", r"\begin{sidewaysfigure}\includegraphics{a}\caption{S}\end{sidewaysfigure}\begin{SCfigure}[1][t]\caption{T}\includegraphics{b}\end{SCfigure}",
        [("a.png", "S", ""), ("b.png", "T", "")]),
    "several pictures share a caption": ("", r"\begin{figure}\includegraphics{a}\includegraphics{b}\caption{Both}\end{figure}", [("a.png", "Both", ""), ("b.png", "Both", "")]),
    "subfigure environments": (
        "", r"\begin{figure}\begin{subfigure}[b]{.5\textwidth}\includegraphics{a}\caption{Left}\label{l}\end{subfigure}"
        r"\begin{subfigure}{.5\textwidth}\includegraphics{b}\caption{Right}\end{subfigure}\caption{Parent}\end{figure}",
        [("a.png", "Left", "Parent"), ("b.png", "Right", "Parent")]),
    "subfloat": ("", r"\begin{figure}\subfloat[Left\label{l}]{\includegraphics{a}}\subfloat[][Right]{\includegraphics{b}}\caption{P}\end{figure}", [("a.png", "Left", "P"), ("b.png", "Right", "P")]),
    "old subfigure command": ("", r"\begin{figure}\subfigure[Left]{\includegraphics{a}}\subfigure{\includegraphics{b}}\caption{P}\end{figure}", [("a.png", "Left", "P"), ("b.png", "P", "")]),
    "subcaptionbox": ("", r"\begin{figure}\subcaptionbox{Left\label{l}}[.4\textwidth]{\includegraphics{a}}\subcaptionbox*{Right}{\includegraphics{b}}\caption{P}\end{figure}", [("a.png", "Left", "P"), ("b.png", "Right", "P")]),
    "minipages with their own captions": (
        "", r"\begin{figure}\begin{minipage}{.5\textwidth}\includegraphics{a}\caption{A}\end{minipage}\begin{minipage}{.5\textwidth}\includegraphics{b}\caption{B}\end{minipage}\end{figure}",
        [("a.png", "A", ""), ("b.png", "B", "")]),
    "minipages that share a caption": (
        "", r"\begin{figure}\begin{minipage}{.5\textwidth}\includegraphics{a}\end{minipage}\begin{minipage}{.5\textwidth}\includegraphics{b}\end{minipage}\caption{AB}\end{figure}",
        [("a.png", "AB", ""), ("b.png", "AB", "")]),
    "caption beside in a minipage": ("", r"\begin{figure}\begin{minipage}{.5\textwidth}\includegraphics{a}\end{minipage}\begin{minipage}{.5\textwidth}\caption{Beside}\end{minipage}\end{figure}", [("a.png", "Beside", "")]),
    "subcaption command in minipages": (
        "", r"\begin{figure}\begin{minipage}{3cm}\includegraphics{a}\subcaption{L}\end{minipage}\begin{minipage}{3cm}\includegraphics{b}\subcaption{R}\end{minipage}\caption{P}\end{figure}",
        [("a.png", "L", "P"), ("b.png", "R", "P")]),
    "captions in order below": ("", r"\begin{figure}\includegraphics{a}\caption{A}\includegraphics{b}\includegraphics{c}\caption{BC}\end{figure}", [("a.png", "A", ""), ("b.png", "BC", ""), ("c.png", "BC", "")]),
    "captions in order above": ("", r"\begin{figure}\caption{A}\includegraphics{a}\caption{B}\includegraphics{b}\end{figure}", [("a.png", "A", ""), ("b.png", "B", "")]),
    "pictures in a tabular": ("", r"\begin{figure}\begin{tabular}{cc}\includegraphics{a}&\includegraphics{b}\\ x & y\end{tabular}\caption{T}\end{figure}", [("a.png", "T", ""), ("b.png", "T", "")]),
    "captionof in a center": ("", r"\begin{center}\includegraphics{a}\captionof{figure}{C}\end{center} \begin{center}\includegraphics{b}\end{center}", [("a.png", "C", "")]),
    "captionof a table is no figure": ("", r"\begin{center}\begin{tabular}{c}x\end{tabular}\captionof{table}{No}\end{center}", []),
    "a picture in a table float": ("", r"\begin{table}\includegraphics{a}\caption{No}\end{table}", []),
    "graphicspath": (r"\graphicspath{{figs/}{other/}}", r"\begin{figure}\includegraphics{x}\caption{X}\end{figure}", [("figs/x.pdf", "X", "")]),
    "macro for the folder": (r"\newcommand{\figdir}{figs}", r"\begin{figure}\includegraphics{\figdir/x}\caption{X}\end{figure}", [("figs/x.pdf", "X", "")]),
    "case of another system": ("", r"\begin{figure}\includegraphics{figs/z}\caption{Z}\end{figure}", [("figs/Z.PNG", "Z", "")]),
    "name with spaces": ("", r'\begin{figure}\includegraphics{"two words"}\caption{S}\end{figure}', [("two words.png", "S", "")]),
    "name with dots": ("", r"\begin{figure}\includegraphics{{v1.2}.pdf}\caption{D}\end{figure}\begin{figure}\includegraphics{v1.2}\caption{E}\end{figure}", [("v1.2.pdf", "D", ""), ("v1.2.pdf", "E", "")]),
    "epsfig and psfig": ("", r"\begin{figure}\epsfig{file=figs/y.eps,width=3cm}\caption{E}\end{figure}\begin{figure}\psfig{figure=figs/y.eps}\caption{F}\end{figure}", [("figs/y.eps", "E", ""), ("figs/y.eps", "F", "")]),
    "AASTeX plots": ("", r"\begin{figure}\plottwo{a.png}{b.png}\caption{P}\end{figure}\begin{figure}\plotone{c.png}\caption{Q}\end{figure}", [("a.png", "P", ""), ("b.png", "P", ""), ("c.png", "Q", "")]),
    "AASTeX gridline": ("", r"\begin{figure}\gridline{\fig{a.png}{.3\textwidth}{(a) left}\fig{b.png}{.3\textwidth}{(b) right}}\caption{G}\end{figure}", [("a.png", "(a) left", "G"), ("b.png", "(b) right", "G")]),
    "overpic": ("", r"\begin{figure}\begin{overpic}[width=3cm]{a.png}\put(1,2){x}\end{overpic}\caption{O}\end{figure}", [("a.png", "O", "")]),
    "user macro for a figure": (
        r"\newcommand{\myfig}[3][1]{\begin{figure}\includegraphics[width=#1\textwidth]{#2}\caption{#3}\end{figure}}",
        r"\myfig{a.png}{First} \myfig[.5]{b.png}{Second}", [("a.png", "First", ""), ("b.png", "Second", "")]),
    "user macro for a picture": (r"\newcommand\pic[1]{\includegraphics[width=3cm]{#1}}", r"\begin{figure}\pic{a}\caption{P}\end{figure}", [("a.png", "P", "")]),
    "def with parameters": (r"\def\pic#1#2{\includegraphics[width=#2]{#1}}", r"\begin{figure}\pic{a}{3cm}\caption{P}\end{figure}", [("a.png", "P", "")]),
    "user environment": (
        r"\newenvironment{myfigure}[1]{\begin{figure}[#1]\centering}{\end{figure}}", r"\begin{myfigure}{ht}\includegraphics{a}\caption{M}\end{myfigure}", [("a.png", "M", "")]),
    "wrapped includegraphics": (
        r"\let\old\includegraphics \renewcommand{\includegraphics}[2][]{\old[#1]{#2}}", r"\begin{figure}\includegraphics{a}\caption{W}\end{figure}\begin{figure}\old{b}\caption{V}\end{figure}",
        [("a.png", "W", ""), ("b.png", "V", "")]),
    "macros in a caption": (
        r"\newcommand{\method}{OurNet\xspace}\newcommand{\vecb}[1]{\mathbf{#1}}\DeclareMathOperator{\argmin}{arg\,min}",
        r"\begin{figure}\includegraphics{a}\caption{\method maps $\vecb{x}$ by $\argmin$.}\end{figure}",
        [("a.png", r"OurNet maps $\mathbf{x}$ by $\operatorname{arg\,min}$.", "")]),
    "xparse macros": (r"\NewDocumentCommand{\pic}{s O{3cm} m}{\includegraphics[width=#2]{#3}}", r"\begin{figure}\pic*[2cm]{a}\pic{b}\caption{X}\end{figure}", [("a.png", "X", ""), ("b.png", "X", "")]),
    "comments": ("", "% \\begin{figure}\\includegraphics{b}\\caption{No}\\end{figure}\n\\begin{figure}\\includegraphics{a}% \\caption{No}\n\\caption{50\\% yes}\\end{figure}", [("a.png", "50% yes", "")]),
    "iffalse and comment environments": (
        "", r"\iffalse\begin{figure}\includegraphics{b}\caption{No}\ifx\a\b\fi\end{figure}\fi\begin{comment}\begin{figure}\includegraphics{c}\caption{No}\end{figure}\end{comment}"
        r"\begin{verbatim}\begin{figure}\includegraphics{c}\caption{No}\end{figure}\end{verbatim}\begin{figure}\includegraphics{a}\caption{Yes}\end{figure}", [("a.png", "Yes", "")]),
    "newif": (r"\newif\iflong \longtrue", r"\iflong\begin{figure}\includegraphics{a}\caption{L}\end{figure}\else\begin{figure}\includegraphics{b}\caption{S}\end{figure}\fi", [("a.png", "L", "")]),
    "pdf or eps": ("", r"\begin{figure}\ifpdf\includegraphics{figs/x.pdf}\else\includegraphics{figs/y.eps}\fi\caption{P}\end{figure}", [("figs/x.pdf", "P", "")]),
    "after the document's end": ("", r"\begin{figure}\includegraphics{a}\caption{A}\end{figure}\end{document}\begin{figure}\includegraphics{b}\caption{No}\end{figure}", [("a.png", "A", "")]),
    "TikZ": (r"\usepackage{tikz}", r"\begin{figure}\begin{tikzpicture}\node{x}; % \end{tikzpicture}" + "\n" + r"\end{tikzpicture}\caption{T}\end{figure}", [("TikZ", "T", "")]),
    "missing file": ("", r"\begin{figure}\includegraphics{nowhere}\caption{N}\end{figure}", [("(file not found)", "N", "")]),
    "no caption": ("", r"\begin{figure}\includegraphics{a}\end{figure}", [("a.png", "", "")]),
    "picture outside of figures": ("", r"\includegraphics{a} text \begin{figure}\includegraphics{b}\caption{B}\end{figure}", [("b.png", "B", "")]),
    "ambiguous captions are no pair": ("", r"\begin{figure}\caption{A}\includegraphics{a}\includegraphics{b}\caption{B}\end{figure}", [("(ambiguous captions)", "", ""), ("(ambiguous captions)", "", "")]),
    "resizebox and centering": ("", r"\begin{figure}[!htbp]\centering\resizebox{\linewidth}{!}{\includegraphics{a}}\vspace{-2mm}\caption{R}\vspace{1mm}\end{figure}", [("a.png", "R", "")]),
    "table of captions in floatrow": ("", r"\begin{figure}\ffigbox{\caption{F}}{\includegraphics{a}}\end{figure}", [("a.png", "F", "")]),
    "unbalanced brace before": ("", "{\\bf open \\begin{figure}\\includegraphics{a}\\caption{U}\\end{figure}", [("a.png", "U", "")]),
    "captions in a row below pictures in a row": ("", r"\begin{figure}\begin{tabular}{cc}\includegraphics{a}&\includegraphics{b}\\ \parbox{3cm}{\caption{A}} & \parbox{3cm}{\caption{B}}\end{tabular}\end{figure}", [("a.png", "A", ""), ("b.png", "B", "")]),
    "unequal rows of pictures and captions": ("", r"\begin{figure}\includegraphics{a}\includegraphics{b}\includegraphics{c}\caption{A}\caption{B}\end{figure}", [("(ambiguous captions)", "", "")] * 3),
    "starred captions are panels'": ("", r"\begin{figure}\begin{minipage}{3cm}\includegraphics{a}\caption*{(a) L}\end{minipage}\begin{minipage}{3cm}\includegraphics{b}\caption*{(b) R}\end{minipage}\caption{All}\end{figure}", [("a.png", "(a) L", "All"), ("b.png", "(b) R", "All")]),
    "a starred caption is a note": ("", r"\begin{figure}\includegraphics{a}\caption{Main}\caption*{Source: us}\end{figure}", [("a.png", "Main", "")]),
    "captions in two languages": ("", r"\begin{figure}\includegraphics{a}\caption{English}\caption{Deutsch}\end{figure}", [("a.png", "English", "")]),
    "command form of minipages": ("", r"\begin{figure}\minipage{.3\textwidth}\includegraphics{a}\caption{A}\endminipage\hfill\minipage{.3\textwidth}\includegraphics{b}\caption{B}\endminipage\end{figure}", [("a.png", "A", ""), ("b.png", "B", "")]),
    "two rows of panels": (
        "", r"\begin{figure}\centering\subfigure[one]{\includegraphics{a}}\hfill\subfigure[two]{\includegraphics{b}}\\\subfigure[three]{\includegraphics{c}\includegraphics{d}}\caption{P}\end{figure}",
        [("a.png", "one", "P"), ("b.png", "two", "P"), ("c.png", "three", "P"), ("d.png", "three", "P")]),
    "panels and a shared legend": ("", r"\begin{figure}\includegraphics{a}\\ \subfloat[L]{\includegraphics{b}}\caption{P}\end{figure}", [("a.png", "P", ""), ("b.png", "L", "P")]),
    "short caption of a subcaptionbox": ("", r"\begin{figure}\subcaptionbox[s]{Left}[3cm][c]{\includegraphics{a}}\caption{P}\end{figure}", [("a.png", "Left", "P")]),
    "captionbox": ("", r"\begin{figure}\captionbox{A\label{x}}{\includegraphics{a}}\hfill\captionbox{B}[3cm]{\includegraphics{b}}\end{figure}", [("a.png", "A", ""), ("b.png", "B", "")]),
    "floatrow of two": ("", r"\begin{figure}\begin{floatrow}\ffigbox{\includegraphics{a}}{\caption{A}}\ffigbox[\FBwidth]{\includegraphics{b}}{\caption{B}}\end{floatrow}\end{figure}", [("a.png", "A", ""), ("b.png", "B", "")]),
    "floatrow with a table first": ("", r"\begin{figure}\begin{floatrow}\capbtabbox{\caption{Table}}{\begin{tabular}{c}x\end{tabular}}\ffigbox{\caption{F}}{\includegraphics{a}}\end{floatrow}\end{figure}", [("a.png", "F", "")]),
    "figure beside a table": (
        "", r"\begin{figure}\begin{minipage}{3cm}\includegraphics{a}\caption{F}\end{minipage}\begin{minipage}{3cm}\begin{tabular}{c}x\end{tabular}\captionof{table}{T}\end{minipage}\end{figure}", [("a.png", "F", "")]),
    "a table's caption by captype": ("", r"\begin{figure}\includegraphics{a}\caption{F}\begin{minipage}{3cm}\makeatletter\def\@captype{table}\makeatother\caption{T}\end{minipage}\end{figure}", [("a.png", "F", "")]),
    "captype outside of figures": ("", r"\begin{center}\makeatletter\def\@captype{figure}\makeatother\includegraphics{a}\caption{C}\end{center}", [("a.png", "C", "")]),
    "captionsetup in a table": ("", r"\begin{table}\begin{minipage}{3cm}\captionsetup{type=figure}\includegraphics{a}\caption{F}\end{minipage}\begin{minipage}{3cm}\caption{T}\includegraphics{b}\end{minipage}\end{table}", [("a.png", "F", "")]),
    "captionof in the text": ("", rf"\includegraphics{{f}} {LOREM}{GAP}{LOREM}{GAP}\includegraphics{{a}}\captionof{{figure}}{{A}}{GAP}{LOREM}{GAP}\includegraphics{{b}}{GAP}\captionof{{figure}}{{B}}", [("a.png", "A", ""), ("b.png", "B", "")]),
    "captionof above, in multicols": ("", rf"\begin{{multicols}}{{2}}{LOREM}{GAP}\captionof{{figure}}{{A}}\includegraphics{{a}}{GAP}{LOREM}{GAP}\captionof{{figure}}{{B}}\includegraphics{{b}}\end{{multicols}}", [("a.png", "A", ""), ("b.png", "B", "")]),
    "captionof beside the picture": ("", r"\begin{center}\begin{minipage}{3cm}\includegraphics{a}\end{minipage}\begin{minipage}{3cm}\captionof{figure}{Beside}\end{minipage}\end{center}", [("a.png", "Beside", "")]),
    "a logo above the teaser": ("", rf"\begin{{center}}\includegraphics{{f}}\end{{center}}{LOREM}" r"\twocolumn[{\begin{center}\includegraphics{a}\captionof{figure}{Teaser}\end{center}}]", [("a.png", "Teaser", "")]),
    "teaser command and environment": ("", r"\teaser{\includegraphics{a}\caption{T}}\begin{teaserfigure}\includegraphics{b}\caption{U}\end{teaserfigure}", [("a.png", "T", ""), ("b.png", "U", "")]),
    "a list keeps captions apart": ("", rf"\begin{{itemize}}\item \includegraphics{{a}} {LOREM} \item \captionof{{figure}}{{No picture}}\end{{itemize}}", []),
    "figures of other names": ("", r"\begin{marginfigure}\includegraphics{a}\caption{M}\end{marginfigure}\begin{floatingfigure}[r]{3cm}\includegraphics{b}\caption{N}\end{floatingfigure}\begin{scheme}\includegraphics{c}\caption{S}\end{scheme}", [("a.png", "M", ""), ("b.png", "N", ""), ("c.png", "S", "")]),
    "figure as a command": ("", r"\figure[ht]\includegraphics{a}\caption{C}\endfigure", [("a.png", "C", "")]),
    "an algorithm in a figure": ("", r"\begin{figure}\begin{algorithm}[H]\caption{Alg}\end{algorithm}\includegraphics{a}\caption{F}\end{figure}", [("a.png", "F", "")]),
    "a picture in a caption is none": ("", r"\begin{figure}\includegraphics{a}\caption{Stars (\includegraphics[height=1ex]{b}) are bright.}\end{figure}", [("a.png", "Stars are bright.", "")]),
    "ContinuedFloat": ("", r"\begin{figure}\includegraphics{a}\caption{F}\end{figure}\begin{figure}\ContinuedFloat\includegraphics{b}\end{figure}", [("a.png", "F", ""), ("b.png", "F", "")]),
    "JHEP and old astronomy": ("", r"\FIGURE[t]{\epsfig{file=figs/y.eps,width=3cm}\caption{J}}\EPSFIGURE[ht]{figs/y.eps,width=3cm}{E}\begin{figure}\epsfxsize=3cm\epsfbox{figs/y.eps}\figcaption{B}\end{figure}", [("figs/y.eps", "J", ""), ("figs/y.eps", "E", ""), ("figs/y.eps", "B", "")]),
    "INFORMS": ("", r"\begin{figure}\FIGURE{\includegraphics{a}}{The caption\label{x}}{A note}\end{figure}", [("a.png", "The caption", "")]),
    "old bounding boxes and overlays": ("", r"\begin{figure}\includegraphics*[0,0][10,10]{a}\includegraphics<1->[width=3cm]{b}\caption{O}\end{figure}", [("a.png", "O", ""), ("b.png", "O", "")]),
    "special": ("", r"\begin{figure}\special{psfile=figs/y.eps hscale=50}\caption{S}\end{figure}", [("figs/y.eps", "S", "")]),
    "plotfour": ("", r"\begin{figure}\plotfour{a}{b}{c}{d}\caption{P}\end{figure}", [("a.png", "P", ""), ("b.png", "P", ""), ("c.png", "P", ""), ("d.png", "P", "")]),
    "xymatrix and inline tikz": ("", r"\begin{figure}$$\xymatrix@C=1em{A \ar[r] & B}$$\tikz[scale=2]{\draw (0,0)--(1,1);}\caption{X}\end{figure}", [("TikZ", "X", ""), ("TikZ", "X", "")]),
    "a picture environment": ("", r"\begin{figure}\begin{picture}(10,10)\put(0,0){\includegraphics{a}}\end{picture}\caption{P}\end{figure}", [("TikZ", "P", "")]),
    "no figure from another number's file": ("", r"\begin{figure}\includegraphics{a.5}\caption{N}\end{figure}", [("(file not found)", "N", "")]),
    "eps named, png there": ("", r"\begin{figure}\includegraphics{a.eps}\caption{C}\end{figure}", [("a.png", "C", "")]),
    "extensions in the author's order": (r"\DeclareGraphicsExtensions{.png,.pdf}", r"\begin{figure}\includegraphics{figs/both}\caption{E}\end{figure}", [("figs/both.png", "E", "")]),
    "pdf before png": (r"\graphicspath{{./figs/},{no/}}", r"\begin{figure}\includegraphics{both}\caption{E}\end{figure}", [("figs/both.pdf", "E", "")]),
    "names with odd signs": ("", r"\begin{figure}\includegraphics{./figs//x}\includegraphics{figs/under\_score}\includegraphics{\detokenize{figs/under_score}.png}\caption{N}\end{figure}", [("figs/x.pdf", "N", ""), ("figs/under_score.png", "N", "")]),
    "never outside": ("", r"\begin{figure}\includegraphics{../../etc/passwd}\includegraphics{/etc/hostname}\caption{N}\end{figure}", [("(file not found)", "N", ""), ("(file not found)", "N", "")]),
    "a trailing brace and a macro in options": (r"\newlength{\w}\newcommand{\wide}{width=3cm}", r"\begin{figure}\includegraphics[\wide,trim={0 0 1 1},clip]{ a }\caption{T}\end{figure}", [("a.png", "T", "")]),
    "begin and end by macros": (r"\def\bfig{\begin{figure}[t]\centering}\def\efig{\end{figure}}\newcommand{\inc}[2]{\includegraphics[width=#2]{figs/#1.pdf}}", r"\bfig\inc{x}{3cm}\caption{M}\efig", [("figs/x.pdf", "M", "")]),
    "a macro in a macro's argument": (r"\newcommand{\two}[2]{\begin{figure}#1\caption{#2}\end{figure}}\newcommand{\pic}[1]{\includegraphics{#1}}", r"\two{\pic{a}\pic{b}}{Of \textbf{two}}", [("a.png", "Of two", ""), ("b.png", "Of two", "")]),
    "delimited def": (r"\def\pic(#1,#2){\includegraphics[width=#2]{#1}}", r"\begin{figure}\pic(a,3cm)\caption{D}\end{figure}", [("a.png", "D", "")]),
    "let and def of commands": (r"\let\ig\includegraphics\def\fig{\caption}", r"\begin{figure}\ig[width=1cm]{a}\fig{L}\end{figure}", [("a.png", "L", "")]),
    "csname and makeatletter": (r"\makeatletter\newcommand{\my@pic}[1]{\includegraphics{#1}}\newcommand{\pic}{\@ifstar{\my@pic}{\my@pic}}\makeatother", r"\begin{figure}\pic*{a}\pic{b}\caption{C}\end{figure}", [("a.png", "C", ""), ("b.png", "C", "")]),
    "xparse conditions": (r"\NewDocumentCommand{\pic}{s o m d()}{\IfBooleanTF{#1}{\includegraphics{#3}}{\IfNoValueTF{#2}{\includegraphics{b}}{\includegraphics{#2}}}}", r"\begin{figure}\pic*{a}\pic{x}\pic[c]{x}(1,2)\caption{X}\end{figure}", [("a.png", "X", ""), ("b.png", "X", ""), ("c.png", "X", "")]),
    "xparse environment": (r"\NewDocumentEnvironment{myfig}{m O{t}}{\begin{figure}[#2]\includegraphics{#1}}{\end{figure}}", r"\begin{myfig}{a}\caption{E}\end{myfig}", [("a.png", "E", "")]),
    "ifthenelse and etoolbox": (r"\usepackage{ifthen}\newboolean{long}\setboolean{long}{false}\newtoggle{x}\toggletrue{x}", r"\begin{figure}\ifthenelse{\boolean{long}}{\includegraphics{a}}{\includegraphics{b}}\iftoggle{x}{\includegraphics{c}}{\includegraphics{d}}\caption{I}\end{figure}", [("b.png", "I", ""), ("c.png", "I", "")]),
    "numbers in conditions": (r"\def\version{2}", r"\begin{figure}\ifnum\version=1 \includegraphics{a}\else\includegraphics{b}\fi\ifcase\version \or\includegraphics{c}\or\includegraphics{d}\fi\if0 \includegraphics{e}\fi\caption{N}\end{figure}", [("b.png", "N", ""), ("d.png", "N", "")]),
    "IfFileExists": ("", r"\begin{figure}\IfFileExists{nowhere.tex}{\includegraphics{a}}{\includegraphics{b}}\caption{I}\end{figure}", [("b.png", "I", "")]),
    "an address with a percent sign": ("", "Text \\url{http://a/b%20c} more. \\begin{figure}\\includegraphics{a}\\caption{See \\url{http://a/b%20c}}\\end{figure}", [("a.png", "See http://a/b%20c", "")]),
    "excluded comments": (r"\usepackage{comment}\excludecomment{old}", r"\begin{old}\begin{figure}\includegraphics{a}\caption{No}\end{figure}\end{old}\begin{figure}\includegraphics{b}\caption{Yes}\end{figure}", [("b.png", "Yes", "")]),
    "figures in braces and landscape": ("", r"{\small\begin{landscape}\begin{figure}\includegraphics{a}\caption{L}\end{figure}\end{landscape}}\afterpage{\begin{figure}\includegraphics{b}\caption{M}\end{figure}}", [("a.png", "L", ""), ("b.png", "M", "")]),
    "wrong end": ("", r"\begin{figure}\includegraphics{a}\caption{A}\end{figure*}\begin{figure}\includegraphics{b}\caption{B}\end{figure}", [("a.png", "A", ""), ("b.png", "B", "")]),
    "mathmode": (r"\def\msun{\ifmmode M_\odot\else$M_\odot$\fi}\newcommand{\al}{\ensuremath{\alpha}}", r"\begin{figure}\includegraphics{a}\caption{\msun\ or $10\msun$, \al{} and $\al_1$, a -- b.}\end{figure}", [("a.png", r"$M_\odot$ or $10 M_\odot$, $\alpha$ and $\alpha_1$, a – b.", "")]),
    "a file that is picture and text": ("", r"\begin{figure}\def\svgwidth{3cm}\input{figs/inks.pdf_tex}\caption{I}\end{figure}", [("TikZ", "I", "")]),
    "input of TikZ": ("", r"\begin{figure}\input{figs/plot.tikz}\caption{I}\end{figure}", [("TikZ", "I", "")]),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_pairs_are_those_of_the_source(name: str, tmp_path: Path) -> None:
    preamble, body, expected = CASES[name]
    write(tmp_path, {**PICTURES, "main.tex": document(body, preamble)})
    assert pairs(read_figures(tmp_path, LIMITS), tmp_path) == expected


def test_inputs_are_read_in_place_and_never_outside(tmp_path: Path) -> None:
    (tmp_path / "secret.tex").write_text(r"\begin{figure}\includegraphics{a}\caption{Secret}\end{figure}")
    root = write(tmp_path / "paper", {
        **PICTURES, "main.tex": document(r"\input{one}\include{parts/two}\input{../secret}\import{sub/}{three}\subfile{sub/four}\input one"),
        "one.tex": r"\begin{figure}\includegraphics{a}\caption{One}\end{figure}\endinput\begin{figure}\includegraphics{b}\caption{No}\end{figure}",
        "parts/two.tex": r"\begin{figure}\includegraphics{b}\caption{Two}\end{figure}\input{parts/two}",
        "sub/three.tex": r"\begin{figure}\includegraphics{own}\caption{Three}\end{figure}", "sub/own.png": "",
        "sub/four.tex": r"\documentclass[../main]{subfiles}\begin{document}\begin{figure}\includegraphics{own}\caption{Four}\end{figure}\end{document}",
        "draft.tex": r"\begin{figure}\includegraphics{c}\caption{Not input by anyone}\end{figure}",
    })  # fmt: skip
    (root / "link.tex").symlink_to(tmp_path / "secret.tex")
    found = read_figures(root, LIMITS)
    assert [(name, caption) for name, caption, _ in pairs(found, root)] == [
        ("a.png", "One"), ("b.png", "Two"), ("sub/own.png", "Three"), ("sub/own.png", "Four"),
    ]  # fmt: skip
    assert any("../secret" in problem for problem in found.problems)
    assert any("circles" in problem for problem in found.problems)


def test_local_styles_give_macros_but_never_redefine_citations(tmp_path: Path) -> None:
    write(tmp_path, {
        **PICTURES, "main.tex": document(r"\begin{figure}\pic{a}\caption{By \ours\ \cite{x}.}\end{figure}", r"\usepackage{mine}"),
        "mine.sty": r"\def\cite#1{BROKEN}\newcommand{\ours}{OurNet}\newcommand{\pic}[1]{\includegraphics{#1}}\def\x@y{\bad}",
    })  # fmt: skip
    assert pairs(read_figures(tmp_path, LIMITS), tmp_path) == [("a.png", "By OurNet.", "")]


def test_a_part_that_is_a_document_does_not_end_the_paper(tmp_path: Path) -> None:
    figure = r"\begin{figure}\includegraphics{%s}\caption{%s}\end{figure}"
    write(tmp_path, {
        **PICTURES, "a_part.tex": document(figure % ("a", "Part"), r"\newcommand{\x}{wrong}"),
        "preamble.tex": r"\documentclass{article}\newcommand{\ours}{OurNet}", "z/unused.tex": figure % ("c", "Unused"),
        "main.tex": r"\input{preamble}\begin{document}\input{a_part}" + figure % ("b", r"Of \ours") + r"\end{document}",
    })  # fmt: skip
    found = read_figures(tmp_path, LIMITS)
    assert found.main_files == ["main.tex"]
    assert pairs(found, tmp_path) == [("a.png", "Part", ""), ("b.png", "Of OurNet", "")]


def test_a_paper_in_a_subfolder_finds_its_styles_and_pictures(tmp_path: Path) -> None:
    write(tmp_path, {
        "paper/main.tex": document(r"\input{parts/one}", r"\usepackage{mine}"), "paper/img/p.png": "", "figs/q.png": "",
        "paper/mine.sty": r"\RequirePackage{more}\graphicspath{{img/}}", "paper/more.sty": r"\newcommand{\pic}[1]{\includegraphics{#1}}",
        "paper/parts/one.tex": r"\begin{figure}\pic{p}\includegraphics{../figs/q}\includegraphics{figs/q}\caption{One}\end{figure}",
    })  # fmt: skip
    assert [name for name, _, _ in pairs(read_figures(tmp_path, LIMITS), tmp_path)] == ["paper/img/p.png", "figs/q.png"]


def test_fragments_without_a_document_are_each_read_once(tmp_path: Path) -> None:
    write(tmp_path, {**PICTURES, "a_inner.tex": r"\begin{figure}\pic\caption{In}\end{figure}", "outer.tex": r"\def\pic{\includegraphics{a}}\input a_inner "})
    assert pairs(read_figures(tmp_path, LIMITS), tmp_path) == [("a.png", "In", "")]


def test_a_turned_picture_and_a_page_are_kept_as_options(tmp_path: Path) -> None:
    body = r"\begin{figure}\rotatebox[origin=c]{-90}{\includegraphics[page=3,trim=1 2 3 4,clip]{figs/x}}\caption{R}\end{figure}"
    write(tmp_path, {**PICTURES, "main.tex": document(body)})
    (figure,) = read_figures(tmp_path, LIMITS).figures
    assert (figure.page, figure.options) == (3, "page=3,trim=1 2 3 4,clip,angle=-90")


def test_tikz_has_the_preamble_that_it_needs(tmp_path: Path) -> None:
    preamble = (
        r"\usepackage[dvipsnames]{xcolor}\usepackage{tikz}\usetikzlibrary{calc}\tikzset{box/.style={draw}}\definecolor{mine}{rgb}{1,0,0}"
        r"\newlength\gap\setlength\gap{3mm}\newcommand{\lab}[1]{\textbf{#1}}\section{No}"
    )
    write(tmp_path, {**PICTURES, "main.tex": document(r"\begin{figure}\tikz{\node{x};}\caption{T}\end{figure}", preamble)})
    (figure,) = read_figures(tmp_path, LIMITS).figures
    wanted = (r"\usetikzlibrary{calc}", r"\tikzset{box/.style={draw}}", r"\definecolor{mine}{rgb}{1,0,0}", r"\setlength\gap{3mm}", r"{\textbf{#1}}")
    assert all(line in figure.preamble for line in wanted) and "section" not in figure.preamble


def test_two_main_documents_give_each_pair_once_and_a_supplement_its_own(tmp_path: Path) -> None:
    figure = r"\begin{figure}\includegraphics{a}\caption{A}\end{figure}"
    write(tmp_path, {**PICTURES, "main.tex": document(figure), "old.tex": document(figure),
                     "supp.tex": document(r"\begin{figure}\includegraphics{b}\caption{B}\end{figure}")})  # fmt: skip
    assert [caption for _, caption, _ in pairs(read_figures(tmp_path, LIMITS), tmp_path)] == ["A", "B"]


def test_labels_panels_and_context(tmp_path: Path) -> None:
    body = (
        "First paragraph, see Fig.~\\ref{fig:p}.\n\nNothing here.\n\nIn Figure~\\ref{fig:p}(a) \\cite{k} and \\cref{fig:q,fig:l}.\n\n"
        "\\begin{figure}\\subfloat[L\\label{fig:l}]{\\includegraphics{a}}\\subfloat[R]{\\includegraphics{b}}\\caption{P}\\label{fig:p}\\end{figure}"
    )
    write(tmp_path, {**PICTURES, "main.tex": document(body)})
    left, right = read_figures(tmp_path, LIMITS).figures
    assert (left.figure_id, left.panel, left.panels, left.label) == ("fig1", "a", 2, "fig:l")
    assert (right.panel, right.label) == ("b", "fig:p")
    assert right.context == "First paragraph.\n\nIn Figure (a) and Figure."
    assert left.tex_file == "main.tex"


@pytest.mark.parametrize("latex, text", [
    (r"A \textbf{bold}, \emph{it} and \textcolor{red}{red} word~\cite{a,b}.", "A bold, it and red word."),
    (r"See (Fig.~\ref{x}), \citep[see][p.~3]{y}, and [\cite{z}, \cite{q}] on.", "See on."),
    (r"\SI{3.5}{\metre\per\second}, \qty{50}{nm}, 5~mm, 50\% \& \# \_ \$", "3.5 m/s, 50 nm, 5 mm, 50% & # _ $"),
    ("\\'{e} \\\"o \\ss{} na\\\"{\\i}ve ``q'' -- ---", "é ö ß naïve “q” – —"),
    (r"Foo\footnote{bar} \href{http://x.y}{link} \url{http://a.b/c_d}", "Foo link http://a.b/c_d"),
    (r"$\ensuremath{\alpha}_i$ and H$_2$O and 10\textsuperscript{th}", r"$\alpha_i$ and H$_2$O and 10th"),
    (r"\unknownmacro{kept} {\bf bold} {\color{blue} blue} \centering it", "kept bold blue it"),
    (r"The line \protect\raisebox{2pt}{\tikz{\draw[red] (0,0) -- (1,0);}} shows", "The line shows"),
    (r"\texorpdfstring{$\alpha$}{alpha} rays \vspace{2mm} \hspace*{1cm}\\ next", r"$\alpha$ rays next"),
    (r"Broken {brace \textbf{x", "Broken brace x"),
    (r"unbalanced } and { and $x and \textbf{y", "unbalanced and and $x and y"),
    (r"shown by \citet{x}. Data from \citet{x} are shown, adapted from~\cite{y}.", "shown. Data are shown, adapted."),
    (r"et al.~\cite{x}, we; \cite{a}, \cite{b}, and \cite{c} say.", "et al., we; say."),
    (r"Figs.~\ref{a} and \ref{b}, Eq.~(\ref{e}), \cref{fig:a,fig:b}(a) and see \S\ref{q}.", "Figs., Eq., Figure (a) and."),
    (r"the function \texttt{main()} of array[] at f( x ), 1..10", "the function main() of array[] at f( x ), 1..10"),
    (r"$\{1,..,n\}$, \(x , y\) and \[z\]", r"$\{1,..,n\}$, $x , y$ and $z$"),
    (r"\eg this, \etal. and \unknown[opt]{x} \ang{30} hy\-phen `q'", "e.g. this, et al. and x 30° hyphen ‘q’"),
])  # fmt: skip
def test_captions_read_as_a_reader_sees_them(latex: str, text: str) -> None:
    assert readable(latex) == text


HOSTILE = {
    "endless macro": r"\def\a{\a x}\a",
    "doubling macros": "".join(rf"\def\{chr(97 + i)}{{\{chr(98 + i)}\{chr(98 + i)}}}" for i in range(25)) + r"\a",
    "deep braces": "{" * 100_000 + "}" * 100_000,
    "unclosed arguments": r"\newcommand{\m}[1]{#1}" + r"\m{" * 20_000,
    "deep environments": r"\begin{minipage}{1cm}" * 50_000,
    "growing argument": r"\def\g#1{\g{#1#1}}\g{xxxxxxxx}",
    "million conditions": r"\iftrue" * 200_000,
    "a long line": "x" * 5_000_000 + r"\includegraphics{" * 1000,
    "endless captions": r"\begin{figure}\caption{" * 5000,
    "a condition without numbers": r"\ifnum " + r"\averylongnameofamacro" * 50_000,
    "open brackets": r"\includegraphics[" * 100_000,
    "a gap after a gap": r"\begin{figure}\includegraphics{b}\caption{(" + r"\cite{x} " * 5_000 + r"}\end{figure}",
    "many captions": r"\begin{figure}" + r"\caption{x}" * 100_000 + r"\includegraphics{a}" * 3 + r"\end{figure}",
    "NUL and control characters": "\x00\x01\x02\x03999\x04",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_sources_end_and_keep_what_came_before(name: str, tmp_path: Path) -> None:
    write(tmp_path, {**PICTURES, "main.tex": document(r"\begin{figure}\includegraphics{a}\caption{First}\end{figure}" + HOSTILE[name])})
    limits = LIMITS.model_copy(update={"expansions": 20_000, "tex_bytes": 8_000_000})
    start = time.monotonic()
    found = read_figures(tmp_path, limits)
    assert time.monotonic() - start < 20
    assert pairs(found, tmp_path)[0] == ("a.png", "First", "")


@pytest.mark.skipif(not CELERITE.exists(), reason="the corpus of LaTeX sources is not beside the repository")
def test_a_published_paper_gives_each_of_its_thirteen_pairs() -> None:
    found = read_figures(CELERITE, LIMITS)
    names = [name_of(figure, CELERITE).rpartition("/")[2].removesuffix(".pdf") for figure in found.figures]
    assert names == [
        "sho", "error", "benchmark_darwin", "correct", "wrong-qpo", "bic", "rotation", "astero", "astero-corner", "astero-comp",
        "transit-ml", "transit-corner", "benchmark_darwin_carma",
    ]  # fmt: skip
    assert found.figures[3].caption == (
        "(top left) A simulated dataset (black error bars), and MAP model (blue contours). (bottom left) The residuals between the mean "
        "predictive model and the data shown in the top left figure. (right) The inferred PSD – the blue contours encompass 68% of the "
        "posterior mass – compared to the true PSD (dashed black line)."
    )
    starts = [figure.caption[:40] for figure in found.figures]
    assert starts[5].startswith("The Bayesian information criterion (BIC)") and starts[8].startswith("The probabilistic constraints on $\\nu")
    assert all(len(figure.caption.split()) > 20 and figure.context and figure.panels == 1 for figure in found.figures)
