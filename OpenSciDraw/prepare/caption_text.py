"""LaTeX of a caption or paragraph (macros expanded) -> the text that a reader sees.

Math stays LaTeX between $…$. Citations, cross-references, labels and footnotes go, with brackets that only pointed to
them ("(see \\cite{y})", "(Figure~\\ref{x})"): their numbers and notes stand elsewhere. All else that a reader sees
stays ("shown in Figure"). The parsing is pylatexenc's.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

_MAX_DEPTH = 60  # of braces: pylatexenc's parser is recursive
_MAX_CHARS = 60_000
_GONE_1 = (  # with their one argument
    "label ref autoref cref Cref vref eqref pageref nameref subref Ref cpageref hyperref@ref index footnote footnotetext "
    "footnotemark thanks vspace hspace vskip hskip phantom hphantom vphantom bibitem nocite captionsetup addtocounter todo "
    "pagestyle thispagestyle selectfont fontsize@ color pagecolor linespread phantomsection fontfamily fontseries fontshape"
).split()
_CITES = (
    "cite citep citet citealt citealp citeauthor citeyear citeyearpar citetext Cite Citep Citet parencite textcite autocite "
    "footcite supercite fullcite onlinecite citenum citen citeN shortcite shortciteN citeNP citeA citeyearNP Citealp Citealt"
).split()
_KEEP_1 = (
    "textbf textit textsl textsc texttt textrm textsf textup textmd textnormal emph em underline uline mbox hbox fbox makebox "
    "framebox textsuperscript textsubscript uppercase MakeUppercase lowercase MakeLowercase sout so hl ul protect@ "
    "url path nolinkurl detokenize boldmath@ raisebox@ smash ce ch bm text mathrm mathbf subfiglabel enquote added num textquote"
).split()
_KEEP_2 = (
    "textcolor colorbox href raisebox scalebox texorpdfstring@ foreignlanguage hyperlink hypertarget fontsize@ parbox".split()
)
_SI_UNITS = {
    "metre": "m", "meter": "m", "second": "s", "kilogram": "kg", "gram": "g", "ampere": "A", "kelvin": "K", "mole": "mol",
    "candela": "cd", "hertz": "Hz", "newton": "N", "pascal": "Pa", "joule": "J", "watt": "W", "volt": "V", "ohm": "Ω",
    "tesla": "T", "degree": "°", "celsius": "°C", "degreeCelsius": "°C", "percent": "%", "electronvolt": "eV", "liter": "l",
    "litre": "l", "minute": "min", "hour": "h", "day": "d", "bar": "bar", "byte": "B", "bit": "bit", "decibel": "dB",
    "kilo": "k", "mega": "M", "giga": "G", "tera": "T", "milli": "m", "micro": "µ", "nano": "n", "pico": "p", "centi": "c",
    "femto": "f", "per": "/", "squared": "²", "cubed": "³", "square": "", "cubic": "", "angstrom": "Å", "arcsecond": "″",
    "nm": "nm", "mm": "mm", "cm": "cm", "km": "km", "um": "µm", "ms": "ms", "us": "µs", "ns": "ns", "fs": "fs", "kHz": "kHz",
    "MHz": "MHz", "GHz": "GHz", "THz": "THz", "eV": "eV", "keV": "keV", "MeV": "MeV", "GeV": "GeV", "TeV": "TeV", "mV": "mV",
    "kV": "kV", "mW": "mW", "kW": "kW", "kg": "kg", "mg": "mg", "ug": "µg", "kPa": "kPa", "MPa": "MPa", "GPa": "GPa", "dB": "dB",
}  # fmt: skip
_SYMBOLS = {
    "par": "\n\n", "newline": " ", "\\": " ", "linebreak": " ", "quad": " ", "qquad": " ", "slash": "/", "ldots": "…", "dots": "…",
    "textgreater": ">", "textless": "<", "textbar": "|", "textdegree": "°", "degree": "°", "texttimes": "×", "textmu": "µ",
    "micro": "µ", "textpm": "±", "protect": "", "xspace": " ", "AA": "Å", "angstrom": "Å", "checkmark": "✓", "item": "\n- ",
    "textsquare": "□", "LaTeX": "LaTeX", "TeX": "TeX",
}  # fmt: skip
_MATH_ENVIRONMENTS = (
    "equation",
    "equation*",
    "align",
    "align*",
    "displaymath",
    "math",
    "eqnarray",
    "eqnarray*",
    "gather",
    "gather*",
    "multline",
)
_GAP = "\x05"  # where a citation or reference was: tidied away with the words around it
_POINTERS = (
    r"(?:[Ff]igures?|[Ff]igs?\.?|[Ss]ections?|[Ss]ec(?:s|ts?)?\.|§+|[Ee]quations?|[Ee]qs?\.|[Ee]qns?\.|[Tt]ables?|[Tt]abs?\.|"
    r"[Rr]efs?\.|[Rr]eferences?|[Aa]ppendix|[Aa]ppendices|[Aa]pp\.|[Aa]lgorithms?|[Aa]lg\.|[Cc]hapters?|[Tt]heorems?|[Ll]emmas?|[Ll]istings?)"
)
_GAPS = rf"\(?{_GAP}\)?(?:[\s~,;–-]*(?:and|to|or|&)?[\s~]*\(?{_GAP}\)?)*"
_LEAD = r"(?:(?:see|cf\.|see also|e\.g\.,?|i\.e\.,?|after|adapted from|taken from|from|compare|following|as in|data from)\s+)?"
_BRACKETED = re.compile(rf"\s*[(\[](?:{_LEAD}(?:also\s+)?(?:{_POINTERS}[\s~]*)?{_GAPS}[\s,;.]*)+[)\]]", re.IGNORECASE)
_LINE_BREAK = re.compile(r"\n\s*\n\s*")


def readable(latex: str) -> str:
    """Text of a piece of LaTeX; '' for what only holds commands. Never raises: what cannot be parsed is stripped crudely."""
    from pylatexenc.latexwalker import LatexWalkerError

    latex = re.sub(r"\\ensuremath\s*\{([^{}]*)\}|\\ensuremath(?![A-Za-z])", r"\1", latex[:_MAX_CHARS])
    if _depth(latex) > _MAX_DEPTH:
        return _tidy(_crude(latex))
    walker_context, text_context = _contexts()
    try:
        return _tidy(_convert(latex, walker_context, text_context))
    except (LatexWalkerError, RecursionError, IndexError, ValueError, AttributeError, TypeError):  # pylatexenc on broken input
        return _tidy(_crude(latex))


def _depth(latex: str) -> int:
    depth = deepest = 0
    for token in re.finditer(r"\\.|[{}\[\]$]", latex, re.DOTALL):
        depth += (token[0] in "{[") - (token[0] in "}]")
        deepest = max(deepest, depth)
    return deepest


def _convert(latex: str, walker_context: Any, text_context: Any) -> str:
    from pylatexenc.latex2text import LatexNodes2Text
    from pylatexenc.latexwalker import LatexWalker

    nodes, _, _ = LatexWalker(latex, latex_context=walker_context, tolerant_parsing=True).get_latex_nodes()
    converter = LatexNodes2Text(
        latex_context=text_context, math_mode="verbatim", keep_braced_groups=False, strict_latex_spaces=False
    )
    return converter.nodelist_to_text(nodes)


@lru_cache(maxsize=1)
def _contexts() -> tuple[Any, Any]:
    """What pylatexenc knows of macros' arguments, and how they become text, with what it lacks for captions."""
    from pylatexenc import latex2text, latexwalker, macrospec

    walker = latexwalker.get_default_latex_context_db()
    text = latex2text.get_default_latex_context_db()
    arguments: dict[str, str] = {name: "*[[{" for name in _CITES}
    arguments |= {name: "*[{" if name in ("footnote", "footnotetext", "vspace", "hspace", "todo") else "*{" for name in _GONE_1}
    arguments |= {name: "{" for name in _KEEP_1} | {name: "[{" for name in ("makebox", "framebox", "num", "enquote", "fbox")}
    arguments |= {
        "textcolor": "[{{",
        "colorbox": "[{{",
        "href": "[{{",
        "raisebox": "{[[{",
        "scalebox": "{[{",
        "foreignlanguage": "{{",
    }
    arguments |= {
        "hyperlink": "{{",
        "hypertarget": "{{",
        "parbox": "[[[{{",
        "texorpdfstring": "{{",
        "hyperref": "[{",
        "footnotemark": "[",
    }
    arguments |= {
        "SI": "[{[{",
        "qty": "[{{",
        "si": "[{",
        "unit": "[{",
        "ang": "[{",
        "SIrange": "[{{{",
        "color": "[{",
        "rule": "[{{",
    }
    arguments |= {
        "includegraphics": "*[[{",
        "caption": "*[{",
        "multicolumn": "{{{",
        "acrshort": "{",
        "gls": "[{",
        "ac": "{",
        "fontsize": "{{",
    }
    arguments |= {"tikz": "[{", "tikzsetnextfilename": "{", "linewidth": ""}
    walker.add_context_category("captions", prepend=True, macros=[macrospec.std_macro(n, a) for n, a in arguments.items()])

    gone: Callable[..., str] = lambda node, l2tobj: ""  # noqa: E731
    gap: Callable[..., str] = lambda node, l2tobj: _GAP  # noqa: E731
    last: Callable[..., str] = lambda node, l2tobj: l2tobj.node_arg_to_text(node, len(node.nodeargd.argnlist) - 1)  # noqa: E731
    first: Callable[..., str] = lambda node, l2tobj: l2tobj.node_arg_to_text(node, 0)  # noqa: E731
    rules: dict[str, Any] = {name: gap for name in (*_CITES, *_GONE_1[:11])} | {name: gone for name in _GONE_1[11:]}
    rules["label"] = gone
    rules |= {name: last for name in (*_KEEP_1, *_KEEP_2, "hyperref", "multicolumn", "gls", "ac", "acrshort", "ang")}
    rules |= {"texorpdfstring": first, "rule": gone, "includegraphics": gone, "tikz": gone, "fontsize": gone}
    rules |= {"SI": _quantity, "qty": _quantity, "si": _unit, "unit": _unit, "SIrange": _range, "caption": last}
    rules |= _SYMBOLS
    macros = [latex2text.MacroTextSpec(name, simplify_repl=rule) for name, rule in rules.items()]
    keep: Callable[..., str] = lambda node, l2tobj: node.latex_verbatim()  # noqa: E731
    environments = [latex2text.EnvironmentTextSpec(name, simplify_repl=keep) for name in _MATH_ENVIRONMENTS]
    text.add_context_category("captions", prepend=True, macros=macros, environments=environments)
    return walker, text


def _quantity(node: Any, l2tobj: Any) -> str:
    arguments = node.nodeargd.argnlist
    return f"{l2tobj.node_arg_to_text(node, 1)} {_units(arguments[-1])}"


def _unit(node: Any, l2tobj: Any) -> str:
    return _units(node.nodeargd.argnlist[-1])


def _range(node: Any, l2tobj: Any) -> str:
    return f"{l2tobj.node_arg_to_text(node, 1)}–{l2tobj.node_arg_to_text(node, 2)} {_units(node.nodeargd.argnlist[-1])}"


def _units(argument: Any) -> str:
    """siunitx's units, as macros or as written: \\metre\\per\\second, m/s."""
    written = argument.latex_verbatim().strip("{}")
    words = re.sub(r"\\([A-Za-z]+)\s*", lambda m: _SI_UNITS.get(m[1], m[1]), written)
    return words.replace("~", " ").replace(".", "·").strip()


def _crude(latex: str) -> str:
    text = re.sub(rf"\\(?:{'|'.join([*_CITES, *_GONE_1[:11]])})\*?(?:\[[^\]]*\])*\{{[^{{}}]*\}}", _GAP, latex)
    text = re.sub(r"\\(?:footnote|vspace|hspace)\*?\{[^{}]*\}", "", text)
    text = re.sub(r"\\([%&#_$])", r"\1", text)
    return re.sub(r"\\[A-Za-z@]+\*?(?:\[[^\]]*\])?|\\.|[{}]", " ", text)


def _tidy(text: str) -> str:
    """Blanks and punctuation as they would be had what is gone never stood there."""
    text = _BRACKETED.sub("", text.replace("\u00a0", " "))
    text = text.replace(_GAP, "")
    text = _LINE_BREAK.sub("\n\n", text)
    text = "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))
    text = re.sub(r"\(\s*[,;.]*\s*\)|\[\s*[,;]*\s*\]", "", text)
    text = re.sub(r" +([,.;:!?)\]])", r"\1", text)
    text = re.sub(r"([(\[]) +", r"\1", text)
    text = re.sub(r"([,;:])\s*(?=[,;.])", "", text)
    text = re.sub(r"\.\.(?!\.)(?<!\.\.\.)", ".", text)
    return re.sub(r"[ \t]+", " ", text).strip(" \n,;")
