"""What MkDocs does to a page beyond its settings (mkdocs.yml), so that pages written for GitHub also work on the website.

- A relative link that leaves docs/ (../configs/x.py) leads to the file at `repo_url`; without a `repo_url` its text stays, without
  the link. A file that is not there is a warning, which `mkdocs build --strict` counts as an error.
- `\\|` inside code in a table is shown as `|`, as GitHub shows it.
"""

from __future__ import annotations

import logging
import posixpath
import re
from pathlib import Path
from typing import Any

_LOG = logging.getLogger("mkdocs.hooks.site_hooks")
_FENCE = re.compile(r"^(```.*?^```)", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((\.\./[^)\s]+)\)")
_CODE = re.compile(r"<code>[^<]*</code>")


def _outside(match: re.Match[str], page: str, config: Any) -> str:
    """A link of `page` (a path inside docs/) as it is on the website."""
    text, target = match[1], match[2]
    docs = Path(config["docs_dir"])
    file, _, anchor = target.partition("#")
    place = posixpath.normpath(posixpath.join(docs.name, posixpath.dirname(page), file))
    path = docs.parent / place
    if not path.exists():
        _LOG.warning("%s links to %s, which is not there", page, target)
    if not config["repo_url"]:
        return text
    kind = "tree" if path.is_dir() else "blob"
    return f"[{text}]({config['repo_url'].rstrip('/')}/{kind}/HEAD/{place}{'#' if anchor else ''}{anchor})"


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    parts = _FENCE.split(markdown)  # fenced blocks have odd numbers
    parts[::2] = [_LINK.sub(lambda match: _outside(match, page.file.src_uri, config), part) for part in parts[::2]]
    return "".join(parts)


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    return _CODE.sub(lambda match: match[0].replace("\\|", "|"), html)
