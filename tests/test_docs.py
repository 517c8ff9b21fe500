"""The pages of docs/: every one is in the navigation, every package in the API reference, and links lead somewhere."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
CODE = re.compile(r"```.*?^\s*```|`[^`\n]*`", re.MULTILINE | re.DOTALL)


def test_the_navigation_has_every_page_once():
    nav = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2].partition("\n\n")[0]
    named = re.findall(r"- ([\w/]+\.md)$", nav, re.MULTILINE)
    assert sorted(named) == [page.relative_to(ROOT / "docs").as_posix() for page in PAGES]


def test_the_reference_has_every_package_once():
    found = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]
    files = [file for pattern in found["include"] for file in ROOT.glob(f"{pattern}/**/__init__.py")]
    packages = {".".join(file.parent.relative_to(ROOT).parts) for file in files}
    text = "\n".join(page.read_text() for page in PAGES if page.parent.name == "api")
    assert sorted(re.findall(r"^::: modules ([\w.]+)$", text, re.MULTILINE)) == sorted(packages)


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES], ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page: Path):
    for target in re.findall(r"\]\(([^)\s]+)\)", CODE.sub("", page.read_text())):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.is_file() and file.is_relative_to(ROOT), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(file), f"{page.name}: {target}"


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as MkDocs and code hosts make them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip()) for heading in headings}
