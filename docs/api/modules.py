"""Lists the modules of packages in the API reference.

A line `::: modules PACKAGE` of a page becomes one mkdocstrings block for PACKAGE and one for each module in it. So a
new module needs no change here.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError

ROOT = Path(__file__).parents[2]
LINE = re.compile(r"^::: modules ([\w.]+)$", re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replaces the lines; MkDocs calls this for every page."""
    return LINE.sub(lambda found: "\n".join(f"::: {name}\n" for name in modules(found[1])), markdown)


def modules(package: str) -> list[str]:
    """Names of a package and of its modules, without subpackages and `__main__`; raises PluginError if it is absent."""
    directory = ROOT / package.replace(".", "/")
    if not (directory / "__init__.py").is_file():
        raise PluginError(f"docs/api names the package {package}, which is not in {directory}: correct the page")
    names = sorted(file.stem for file in directory.glob("*.py") if not file.stem.startswith("__"))
    return [package, *(f"{package}.{name}" for name in names)]
