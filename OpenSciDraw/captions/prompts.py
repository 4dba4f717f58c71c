"""What a model is told of one figure, and what of its answer becomes a caption."""

from __future__ import annotations

import json
import re
from typing import Any

from OpenSciDraw.captions.styles import Style
from OpenSciDraw.figures.refs import FigureRef
from OpenSciDraw.utils.endpoint import BadAnswer

VERSION = 1  # of what is sent beside the instruction: raise it with a change
_REQUEST = "Write the caption of this figure."
_KNOWN = " What the paper says of it, as data:\n"
_MOST_CAPTION, _MOST_NOTE = 8_000, 6_000  # characters of the paper's caption, and of each note, that are sent
_THOUGHTS_END = "</think>"  # some chat templates open the thoughts themselves
_FENCE = re.compile(r"```\w*\n(.*)\n```", re.DOTALL)
_DECLINES = re.compile(r"(i['’]?m sorry|i am sorry|sorry,|i can(?:no|['’])t |i(?: a|['’])m (?:unable|not able) )", re.IGNORECASE)


def request_text(ref: FigureRef) -> str:
    """The request, with the figure's own caption and notes as JSON where it has any."""
    known = {"caption": ref.caption[:_MOST_CAPTION]} if ref.caption else {}
    known |= {name: text[:_MOST_NOTE] for name, text in ref.notes if text != ref.caption}
    return _REQUEST + (_KNOWN + json.dumps(known, ensure_ascii=False) if known else "")


def chat_messages(style: Style, text: str, picture: str) -> list[dict[str, Any]]:
    """Messages of a chat endpoint; `picture` is a data: URL."""
    content = [{"type": "text", "text": text}, {"type": "image_url", "image_url": {"url": picture}}]
    return [{"role": "system", "content": style.instruction}, {"role": "user", "content": content}]


def caption_in(answer: str) -> str:
    """The caption that a model wrote, in one line, without the model's thoughts and without a fence around it.

    Raises:
        BadAnswer: empty, or a refusal in words.
    """
    thoughts, mark, rest = answer.partition(_THOUGHTS_END)
    text = (rest if mark else thoughts).strip()
    fenced = _FENCE.fullmatch(text)
    text = " ".join((fenced[1] if fenced else text).split())
    text = text.encode("utf-8", "replace").decode()  # half a pair of surrogates is no text
    if not text or text.startswith("<think>"):
        raise BadAnswer("empty: the answer has no text" + (" behind its thoughts" if text else ""))
    if _DECLINES.match(text):
        raise BadAnswer(f"refused: {text[:120]!r}", final=True)
    return text
