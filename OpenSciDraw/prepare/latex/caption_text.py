"""LaTeX of a caption or paragraph (macros expanded) -> the text that a reader sees.

Formulas stay LaTeX between $…$. Citations, cross-references, labels and footnotes go, with what only pointed to them
("(see \\cite{y})", "(Figure~\\ref{x})", "by \\citet{z}"): their numbers and notes stand elsewhere. All else that a
reader sees stays ("shown in Figure"). The parsing is pylatexenc's.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

_MAX_DEPTH = 60  # of braces: pylatexenc's parser is recursive
_MAX_CHARS = 60_000
_REFERENCES = "ref autoref cref Cref vref Vref eqref pageref nameref subref Ref cpageref labelcref figref fref Fref".split()
_GONE_1 = (  # with their one argument
    "label index footnote footnotetext thanks vspace hspace vskip hskip phantom hphantom vphantom bibitem nocite "
    "captionsetup addtocounter setcounter todo marginpar pagestyle thispagestyle color pagecolor linespread fontfamily "
    "fontseries fontshape definecolor phantomsection selectfont hypersetup addcontentsline"
).split()
_CITES = (
    "cite citep citet citealt citealp citeauthor citeyear citeyearpar citetext Cite Citep Citet parencite textcite autocite "
    "footcite supercite fullcite onlinecite citenum citen citeN shortcite shortciteN citeNP citeA citeyearNP Citealp Citealt "
    "Citeauthor Parencite Textcite Autocite smartcite cites parencites textcites citeposs citealias"
).split()
_KEEP_1 = (
    "textbf textit textsl textsc texttt textrm textsf textup textmd textnormal textlf emph em underline uline mbox hbox fbox "
    "makebox framebox textsuperscript textsubscript uppercase MakeUppercase lowercase MakeLowercase sout so hl ul st uwave "
    "url path nolinkurl detokenize smash ce ch bm text mathrm mathbf subfiglabel enquote added num textquote acs acl acp glspl "
    "acrlong acrfull Gls ac gls acrshort hyperref ang boldsymbol textquotedbl unboldmath xout"
).split()
_KEEP_LAST = (
    "textcolor colorbox href raisebox scalebox foreignlanguage hyperlink hypertarget parbox multicolumn resizebox rotatebox"
).split()
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
    "micro": "µ", "textpm": "±", "protect": "", "AA": "Å", "angstrom": "Å", "checkmark": "✓", "item": "\n- ",
    "textsquare": "□", "LaTeX": "LaTeX", "TeX": "TeX", "textasciitilde": "~", "textasciicircum": "^", "textbackslash": "\\",
    "copyright": "©", "textregistered": "®", "texttrademark": "™", "S": "§", "-": "", "textbullet": "•", "textdagger": "†",
    "ddag": "‡", "P": "¶", "pounds": "£", "celsius": "°C", "textunderscore": "_",
    "xspace": "\x0e",
    # of conferences' styles that are not among a paper's files
    "eg": "e.g.\x0e", "Eg": "E.g.\x0e", "ie": "i.e.\x0e", "Ie": "I.e.\x0e", "etal": "et al.\x0e", "etc": "etc.\x0e",
    "cf": "cf.\x0e", "wrt": "w.r.t.\x0e", "vs": "vs.\x0e", "aka": "a.k.a.\x0e", "onedot": ".\x0e", "viz": "viz.\x0e",
}  # fmt: skip
_FORMULAS = "equation align displaymath math eqnarray gather multline alignat flalign".split()
_ARGUMENTS = {  # as pylatexenc writes them: * a star, [ optional, { not
    "footnote": "[{", "footnotetext": "[{", "vspace": "*{", "hspace": "*{", "todo": "[{", "color": "[{", "makebox": "[[{",
    "framebox": "[[{", "num": "[{", "enquote": "*{", "fbox": "{", "textcolor": "[{{", "colorbox": "[{{", "href": "[{{",
    "raisebox": "{[[{", "scalebox": "{[{", "foreignlanguage": "[{{", "hyperlink": "{{", "hypertarget": "{{", "parbox": "[[[{{",
    "texorpdfstring": "{{", "hyperref": "[{", "footnotemark": "[", "SI": "[{[{", "qty": "[{{", "si": "[{", "unit": "[{",
    "ang": "[{", "SIrange": "[{{{", "qtyrange": "[{{{", "numrange": "[{{", "rule": "[{{", "includegraphics": "*[[{",
    "caption": "*[{", "multicolumn": "{{{", "gls": "*[{", "Gls": "*[{", "glspl": "*[{", "ac": "*{", "acs": "*{", "acl": "*{",
    "acp": "*{", "fontsize": "{{", "tikz": "[{", "linewidth": "", "definecolor": "{{{", "setcounter": "{{", "addtocounter": "{{",
    "resizebox": "*{{{", "rotatebox": "[{{", "S": "", "phantomsection": "", "selectfont": "",
    "addcontentsline": "{{{", "vskip": "", "hskip": "",
}  # fmt: skip
_NAMES = {  # of what a label names, by its start
    "fig": "Figure", "figure": "Figure", "tab": "Table", "tbl": "Table", "table": "Table", "sec": "Section", "section": "Section",
    "eq": "Equation", "eqn": "Equation", "alg": "Algorithm", "app": "Appendix", "ch": "Chapter", "chap": "Chapter",
}  # fmt: skip
_GAP = "\x05"  # where a citation, reference or little picture was: tidied away with the words around it
_POINTERS = (
    r"(?:[Ff]igures?|[Ff]igs?\.?|[Ss]ections?|[Ss]ec(?:s|ts?)?\.|§+|[Ee]quations?|[Ee]qs?\.|[Ee]qns?\.|[Tt]ables?|[Tt]abs?\.|"
    r"[Rr]efs?\.|[Rr]eferences?|[Aa]ppendix|[Aa]ppendices|[Aa]pp\.|[Aa]lgorithms?|[Aa]lg\.|[Cc]hapters?|[Tt]heorems?|[Ll]emmas?|[Ll]istings?)"
)
_LIST = re.compile(rf"{_GAP}(?:[ ,;–-]*(?:and|to|or|&)?\s*{_GAP})+")
_LEAD = r"(?:(?:see|cf\.|see also|e\.g\.,?|i\.e\.,?|after|adapted from|taken from|from|compare|following|as in|data from)\s+)?"
_ITEM = rf"{_LEAD}(?:also\s+)?(?:{_POINTERS}\s*)?{_GAP}"
_BRACKETED = re.compile(rf"\s*[(\[]\s*{_ITEM}(?:[\s,;.–-]*(?:and\s+|or\s+|&\s*)?{_ITEM})*[\s,;.]*[)\]]", re.IGNORECASE)
_SEE = re.compile(rf",?(?:^|\s+)(?:see|cf\.)(?:\s+also)?\s+(?:{_POINTERS}\s*)?{_GAP}(?=\s*(?:[,.;:)]|$))", re.IGNORECASE)
_BY = re.compile(rf"(?:^|(?<=\s))(?:as\s+in|by|of|from|in|following|after|to|with|per|e\.g\.,?)\s+{_GAP}")
_AROUND = re.compile(rf"([,;:.]?)\s*{_GAP}[\s{_GAP}]*([,;:.!?)\]]?)")
_FORMULA = re.compile("\x06(\\d+)\x07")
_CRUDE_FORMULA = re.compile(r"\$[^$]{1,2000}\$|\\\([^$]{1,2000}?\\\)")
_QUOTED = re.compile(r"`([^`'\n]{1,200})'")
_BLANK_LINE = re.compile(r"\n\s*\n\s*")


def known_macros() -> frozenset[str]:
    """Macros that captions are understood by: a style of the paper must not redefine them."""
    return frozenset([*_CITES, *_REFERENCES, *_GONE_1, *_KEEP_1, *_KEEP_LAST, "texorpdfstring", "SI", "si", "qty", "unit"])


def readable(latex: str) -> str:
    """Text of a piece of LaTeX; '' for what only holds commands. Never raises: what cannot be parsed is stripped crudely."""
    from pylatexenc.latexwalker import LatexWalkerError

    latex = re.sub(r"\\ensuremath\s*\{([^{}]*)\}|\\ensuremath(?![A-Za-z])", r"\1", latex[:_MAX_CHARS])
    latex = re.sub("[\x05-\x07\x0e]", " ", latex)
    if len(dollars := re.findall(r"\\\\.|\$", latex)) and dollars.count("$") % 2:  # an unclosed formula would take the rest
        latex = "\\$".join(latex.rsplit("$", 1))
    if _depth(latex) <= _MAX_DEPTH:
        try:
            return _tidy(*_convert(latex))
        except (LatexWalkerError, RecursionError, IndexError, ValueError, AttributeError, TypeError):
            pass  # pylatexenc on broken input
    return _tidy(*_crude(latex))


def _depth(latex: str) -> int:
    depth = deepest = 0
    for token in re.finditer(r"\\.|[{}\[\]]|\\begin", latex, re.DOTALL):
        depth += (token[0] in "{[") - (token[0] in "}]")
        deepest = max(deepest, depth)
    return max(deepest, latex.count("\\begin"))


def _convert(latex: str) -> tuple[str, list[str]]:
    """The text, with marks where its formulas are, and the formulas."""
    from pylatexenc.latexwalker import LatexWalker

    walker_context, converter = _contexts()
    converter.formulas = []
    nodes, _, _ = LatexWalker(latex, latex_context=walker_context, tolerant_parsing=True).get_latex_nodes()
    return converter.nodelist_to_text(nodes), converter.formulas


@lru_cache(maxsize=1)
def _contexts() -> tuple[Any, Any]:
    """What pylatexenc knows of macros' arguments, and how they become text, with what it lacks for captions."""
    from pylatexenc import latex2text, latexwalker, macrospec

    class Converter(latex2text.LatexNodes2Text):  # type: ignore[misc]
        formulas: list[str]

        def math_node_to_text(self, node: Any) -> str:
            self.formulas.append(_formula(node.latex_verbatim()))
            return f"\x06{len(self.formulas) - 1}\x07"

    walker = latexwalker.get_default_latex_context_db()
    text = latex2text.get_default_latex_context_db()
    arguments: dict[str, str] = dict.fromkeys(_CITES, "*[[{") | dict.fromkeys([*_REFERENCES, *_GONE_1], "*{")
    arguments |= dict.fromkeys(_KEEP_1, "{") | _ARGUMENTS
    walker.add_context_category("captions", prepend=True, macros=[macrospec.std_macro(n, a) for n, a in arguments.items()])
    walker.set_unknown_macro_spec(macrospec.std_macro("", "*["))  # of a package: its argument is text, its option is none

    gone: Callable[..., str] = lambda node, l2tobj: ""  # noqa: E731
    gap: Callable[..., str] = lambda node, l2tobj: _GAP  # noqa: E731
    last: Callable[..., str] = lambda node, l2tobj: l2tobj.node_arg_to_text(node, len(node.nodeargd.argnlist) - 1)  # noqa: E731
    first: Callable[..., str] = lambda node, l2tobj: l2tobj.node_arg_to_text(node, 0)  # noqa: E731
    rules: dict[str, Any] = dict.fromkeys([*_CITES, *_REFERENCES, "includegraphics", "tikz", "rule"], gap)
    rules |= dict.fromkeys(("autoref", "cref", "Cref", "figref", "fref", "Fref"), _named)
    rules |= dict.fromkeys([*_GONE_1, "fontsize", "footnotemark"], gone) | dict.fromkeys([*_KEEP_1, *_KEEP_LAST, "caption"], last)
    rules |= {"ang": lambda node, l2tobj: last(node, l2tobj) + "°", "texorpdfstring": first}
    rules |= {"SI": _quantity, "qty": _quantity, "si": _unit, "unit": _unit}
    rules |= dict.fromkeys(("SIrange", "qtyrange", "numrange"), _range) | _SYMBOLS
    macros = [latex2text.MacroTextSpec(name, simplify_repl=rule) for name, rule in rules.items()]
    formula: Callable[..., str] = lambda node, l2tobj: l2tobj.math_node_to_text(node)  # noqa: E731
    names = [name + star for name in _FORMULAS for star in ("", "*")]
    environments = [latex2text.EnvironmentTextSpec(name, simplify_repl=formula) for name in names]
    text.add_context_category("captions", prepend=True, macros=macros, environments=environments)
    return walker, Converter(latex_context=text, math_mode="verbatim", keep_braced_groups=False, strict_latex_spaces=False)


def _formula(latex: str) -> str:
    """A formula between $…$, however it was written; environments stay as they are."""
    found = re.fullmatch(r"\$\$(.*)\$\$|\$(.*)\$|\\\((.*)\\\)|\\\[(.*)\\\]", latex, re.DOTALL)
    inner = next((group for group in found.groups() if group is not None), "") if found else latex
    inner = " ".join(re.sub(r"\\label\s*\{[^{}]*\}", "", inner).split())
    return inner if not found else f"${inner}$" if inner else ""


def _named(node: Any, l2tobj: Any) -> str:
    """cleveref's and hyperref's references name what they point to: that is guessed from the label."""
    label = node.nodeargd.argnlist[-1].latex_verbatim().strip("{}")
    name = _NAMES.get(re.split(r"[:_.\-]", label, maxsplit=1)[0].strip().lower().removesuffix("s"), "")
    return f"{name} {_GAP}" if name else _GAP


def _quantity(node: Any, l2tobj: Any) -> str:
    return f"{l2tobj.node_arg_to_text(node, 1)} {_units(node.nodeargd.argnlist[-1])}"


def _unit(node: Any, l2tobj: Any) -> str:
    return _units(node.nodeargd.argnlist[-1])


def _range(node: Any, l2tobj: Any) -> str:
    arguments = node.nodeargd.argnlist
    unit = f" {_units(arguments[-1])}" if len(arguments) == 4 else ""
    return f"{l2tobj.node_arg_to_text(node, 1)}–{l2tobj.node_arg_to_text(node, 2)}{unit}"


def _units(argument: Any) -> str:
    """siunitx's units, as macros or as written: \\metre\\per\\second, m/s."""
    written = argument.latex_verbatim().strip("{}")
    words = re.sub(r"\\([A-Za-z]+)\s*", lambda m: _SI_UNITS.get(m[1], m[1]), written)
    return words.replace("~", " ").replace(".", "·").strip()


def _crude(latex: str) -> tuple[str, list[str]]:
    formulas: list[str] = []

    def mark(found: re.Match[str]) -> str:
        formulas.append(_formula(found[0]))
        return f"\x06{len(formulas) - 1}\x07"

    text = _CRUDE_FORMULA.sub(mark, latex)
    text = re.sub(rf"\\(?:{'|'.join([*_CITES, *_REFERENCES])})\*?(?:\[[^\[\]]{{0,300}}\])*\{{[^{{}}]{{0,1000}}\}}", _GAP, text)
    text = re.sub(r"\\(?:footnote|vspace|hspace|label)\*?\{[^{}]{0,1000}\}", "", text)
    text = re.sub(r"\\([%&#_$])", r"\1", text)
    return re.sub(r"\\[A-Za-z@]+\*?(?:\[[^\[\]]{0,300}\])?|\\.|[{}]", " ", text), formulas


def _tidy(text: str, formulas: list[str]) -> str:
    """Blanks and punctuation as they would be had what is gone never stood there."""
    text = _BLANK_LINE.sub("\n\n", text.replace("\u00a0", " "))
    text = "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))
    if _GAP in text:
        for pattern in (_BRACKETED, _LIST, _BRACKETED, _SEE, _BY):
            text = pattern.sub(_GAP, text)
        text = _AROUND.sub(_joined, re.sub(rf"§+\s*{_GAP}", _GAP, text)).lstrip(" .,;:")
    text = re.sub(r"(?<=\.)\x0e\.?(?=[\w\x06(])|\x0e(?=[\w\x06(])", " ", text)
    text = re.sub(r"(?<=\.)\x0e\.|\x0e", "", text)
    text = _QUOTED.sub(r"‘\1’", text)
    text = _FORMULA.sub(lambda found: formulas[int(found[1])], text)
    return text.strip(" \n,;")


def _joined(found: re.Match[str]) -> str:
    """What stands before and after a gap, as one."""
    before, after = found[1], found[2]
    if after in (")", "]"):
        return before + after if before == "." else after
    if before and after:
        return before if before == after else after if before in ",;:" else before + after
    return before + after if after else before + " "
