"""Findings as one HTML file: the verdict on top, pictures inside, nothing fetched."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from html import escape
from typing import Any

from ...kernels.finding import BAD, GOOD, Finding
from ...kernels.origin import origin

STYLE = """
:root { color-scheme: light dark }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem }
.verdict { font-size: 1.2rem; font-weight: 600; border-left: 6px solid; padding-left: .8rem }
dl { display: grid; grid-template-columns: max-content auto; gap: 0 1rem; font-size: 85% }
dd { margin: 0 }
svg { max-width: 100%; height: auto; background: white; margin: .5rem 0 1.5rem }
"""


def page(title: str, findings: Sequence[Finding]) -> str:
    """The whole file's text. ModuleNotFoundError without matplotlib."""
    ok = all(finding.table().ok is not False for finding in findings)
    devices = dict.fromkeys(finding.device for finding in findings)
    about: dict[str, Any] = {**origin(), "device": ", ".join(devices)}
    about["versions"] = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>" for name, value in about.items())
    verdicts = "<br>".join(escape(finding.table().title) for finding in findings)
    sections = "".join(
        f"<h2>{escape(finding.kind)}</h2>{finding._repr_html_()}{svg(finding.plot())}" for finding in findings
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
        f'<h1>{escape(title)}</h1><p class="verdict" style="border-color:{GOOD if ok else BAD}">'
        f"{'good' if ok else 'bad'}: {verdicts}</p><dl>{rows}</dl>{sections}</html>\n"
    )


def svg(figure: Any) -> str:
    """A matplotlib Figure as an element of HTML."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = file.getvalue()
    return re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
