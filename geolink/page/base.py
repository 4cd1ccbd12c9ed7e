"""Templates and how text of others is shown."""

import base64
import unicodedata
from importlib.resources import files
from pathlib import Path

import jinja2
from markupsafe import Markup

from schemas.errors import GeoLinkError


def render(template: str, **values: object) -> str:
    """A page from a template, named by its package and file; every value is escaped.

    Templates write text that people or files brought as `{{ text | foreign }}`.
    """
    environment = jinja2.Environment(
        autoescape=True,
        trim_blocks=True,
        undefined=jinja2.StrictUndefined,
        loader=jinja2.FunctionLoader(_read),
    )
    environment.filters |= {"foreign": foreign, "visible": visible}
    return environment.get_template(template).render(**values)


def _read(name: str) -> str:
    package, _, path = name.partition("/")
    return files(package).joinpath(path).read_text(encoding="utf-8")


def foreign(text: object) -> Markup:
    """Text that others wrote: escaped, its direction kept to itself, control characters seen."""
    return Markup("<bdi>{}</bdi>").format(visible(text))


def visible(text: object) -> str:
    """Text with control characters as their code points; for places that hold no tags."""
    return "".join(_visible(c) for c in str(text))


def _visible(character: str) -> str:
    if unicodedata.category(character) in ("Cc", "Cs") or character in _BIDI:
        return f"\N{LEFT CEILING}{ord(character):04X}\N{RIGHT CEILING}"
    return character


_BIDI = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Characters that turn the direction of what follows; right-to-left letters need none."""


def data_url(data: bytes, kind: str) -> str:
    """A picture within the page; kind: `png` or `jpeg`."""
    return f"data:image/{kind};base64," + base64.b64encode(data).decode()


def write(page: Path, html: str) -> None:
    """Write a page. Raises GeoLinkError where it cannot be written."""
    try:
        page.write_text(html, encoding="utf-8", newline="\n")
    except OSError as error:
        raise GeoLinkError(f"cannot write {page}: {error.strerror or error}") from error
