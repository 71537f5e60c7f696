"""A page of HTML that needs no other file: its style, pictures and curves inside."""

import base64
import html
import io

import matplotlib
from matplotlib.figure import Figure

from cli.locations import Location, make_folder, write_whole

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402  (the backend is chosen first)

__all__ = ["picture_tag", "pyplot", "svg_of", "write_page"]

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1 { font-size: 1.7rem; margin-bottom: 0; } h2 { margin-top: 2.2rem; border-bottom: 1px solid #ddd; }
img { max-width: 100%; display: block; margin: .5rem 0; } .curves { display: flex; flex-wrap: wrap; gap: 1rem; }
figure { width: 10.5rem; margin: 0; overflow-wrap: anywhere; } figcaption { font-size: .8rem; line-height: 1.3; }
table { border-collapse: collapse; }
td, th { padding: .25rem .9rem; border-bottom: 1px solid #e4e4e4; text-align: left; overflow-wrap: anywhere; }
td.number { text-align: right; font-variant-numeric: tabular-nums; } .note { color: #666; font-size: .9rem; }
pre { background: #f5f5f2; padding: .8rem; overflow-x: auto; }
"""


def write_page(path: Location, title: str, status: str, body: str, refresh: int = 0) -> None:
    """Writes the page, whole or not at all.

    Args:
      path: of the HTML file.
      title: heading; text, as is `status`.
      status: one line under it.
      body: HTML.
      refresh: seconds after which a browser loads it again; 0 for a finished page.
    """
    reload = f'<meta http-equiv="refresh" content="{refresh}">' if refresh else ""
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">{reload}<title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body><h1>{html.escape(title)}</h1><p>{html.escape(status)}</p>"
        f"{body}</body></html>"
    )
    make_folder(path.parent)
    write_whole(path, page)


def picture_tag(data: bytes, text: str, kind: str = "png") -> str:
    """A picture's file inside the page, with the text that stands for it."""
    return f'<img alt="{html.escape(text)}" src="data:image/{kind};base64,{base64.b64encode(data).decode()}">'


def svg_of(figure: Figure) -> str:
    """A figure as inline SVG."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    text = buffer.getvalue()
    return f"<div>{text[text.index('<svg') :]}</div>"
