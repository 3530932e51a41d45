"""Pages put together from the package's own HTML, CSS and JavaScript, so that they need nothing else."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from importlib import resources
from pathlib import Path
from typing import Any

from tandem.errors import InputError

_STYLE = re.compile(r'<link rel="stylesheet" href="static/([a-z.]+)">')
_SCRIPT = re.compile(r'<script src="static/([a-z.]+)" defer></script>')
_NAME = re.compile(r"[a-z]+\.(?:html|css|js)")
GENERATOR = '<meta name="generator" content="tandem view">'


def static_file(name: str) -> str:
    """One of the package's files. Raises LookupError for a name that is none of them."""
    if not _NAME.fullmatch(name):
        raise LookupError(name)
    try:
        return (resources.files("tandem.view") / "static" / name).read_text(encoding="utf-8")
    except OSError:
        raise LookupError(name) from None


def with_title(template: str, title: str) -> str:
    return template.replace("<!-- title -->", html.escape(title))


def self_contained(template: str, *, title: str, data: Mapping[str, Any], source: str = "page") -> str:
    """A template with its styles, scripts and data inside, and a policy that lets nothing else in.

    The page's own scripts run because the policy names their hashes; whatever a model wrote is data that no browser
    takes for a script. `source` tells the page where its samples are.
    """
    page = with_title(static_file(template), title)
    scripts = [static_file(name) for name in _SCRIPT.findall(page)]
    styles = [static_file(name) for name in _STYLE.findall(page)]
    page = _SCRIPT.sub("", _STYLE.sub("", page))
    extra = " file: 'self'" if source == "folder" else ""
    policy = (
        f"default-src 'none'; script-src {_hashes(scripts)}{extra}; style-src {_hashes(styles)}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    head = [
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        GENERATOR,
        *(f"<style>{style}</style>" for style in styles),
    ]
    body = [
        *(
            f'<script type="application/json" id="{name}">{embedded(content)}</script>'
            for name, content in data.items()
        ),
        *(f"<script>{script}</script>" for script in scripts),
    ]
    page = page.replace('data-source="server"', f'data-source="{source}"')
    page = page.replace("<!-- head -->", "\n".join(head))
    return page.replace("<!-- body -->", "\n".join(body))


def embedded(content: Any) -> str:
    """JSON that can stand inside a script element and inside JavaScript.

    All that is not ASCII is escaped, U+2028 among it, and so is what could end the element or begin a comment in it.
    """
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def write_page(path: Path, text: str) -> None:
    """Replace a file at once. Raises InputError where it cannot be written."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        aside.write_text(text, encoding="utf-8")
        aside.replace(path)
    except OSError as error:
        with suppress(OSError):
            aside.unlink()
        raise InputError(f"{path} cannot be written: {error.strerror}; choose another place, or make room.") from error


def _hashes(parts: list[str]) -> str:
    digests = [hashlib.sha256(part.encode()).digest() for part in parts]
    return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)
