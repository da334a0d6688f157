"""Results as sections, and what renders them: console, HTML and Markdown.

One function a kind of result makes sections of it, beside the result itself; a renderer knows sections and no result.
This folder imports nothing of ours but `common`.
"""

from .console import print_sections
from .section import Curve, Plot, Section, Table, grouped, headings

__all__ = ["Curve", "Plot", "Section", "Table", "grouped", "headings", "print_sections"]
