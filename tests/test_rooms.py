"""Import rules of the packages, and maps of `train/` that name every module."""

import ast
import graphlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("moss_audio_jax", "convert", "train")
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in PACKAGES
    for path in (ROOT / package).rglob("*.py")
}
# Module or package -> packages of this repository that it may import from, besides itself; at any depth of a function.
MAY_IMPORT = {
    "moss_audio_jax": (),
    "convert": ("moss_audio_jax",),
    "train.data": ("moss_audio_jax",),
    "train.evaluation": ("moss_audio_jax", "train.data"),
    **{
        f"train.planning.{name}": (
            "moss_audio_jax",
            *(f"train.planning.{other}" for other in ("chips", "flops", "hlo", "interconnect", "topology")),
        )
        for name in ("chips", "flops", "hlo", "interconnect", "topology")
    },
}


def nodes(parents: Iterable[ast.AST], *, of_functions: bool) -> Iterator[ast.AST]:
    """Yields all nodes of a tree; without `of_functions` only those that run at import."""
    for node in parents:
        yield node
        is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        is_for_types = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if of_functions or not (is_function or is_for_types):
            yield from nodes(ast.iter_child_nodes(node), of_functions=of_functions)


def imports(path: Path, *, of_functions: bool = True) -> Iterator[tuple[str, str]]:
    """Yields (module, name) of the imports from this repository; the name is empty for a whole module."""
    for node in nodes([ast.parse(path.read_text("utf-8"))], of_functions=of_functions):
        found: list[tuple[str, str]] = []
        if isinstance(node, ast.Import):
            found = [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}: import by the full name"
            found = [(node.module, alias.name) for alias in node.names]
        for module, name in found:
            if module.partition(".")[0] in PACKAGES:
                yield (f"{module}.{name}", "") if f"{module}.{name}" in MODULES else (module, name)


def is_within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


@pytest.mark.parametrize("importer", MAY_IMPORT)
def test_imports_follow_the_rules(importer: str):
    allowed = (importer, *MAY_IMPORT[importer])
    modules = [name for name in MODULES if is_within(name, importer)]
    assert modules, f"{importer} is gone: correct MAY_IMPORT"
    wrong = [
        f"{name} imports {module}"
        for name in modules
        for module, _ in imports(MODULES[name])
        if not any(is_within(module, package) for package in allowed)
    ]
    assert wrong == []


def test_only_its_command_imports_the_endpoint():
    """So that its libraries may be absent."""
    wrong = [
        f"{name} imports {module}"
        for name in MODULES
        if name != "moss_audio_jax.__main__" and not is_within(name, "moss_audio_jax.serving")
        for module, _ in imports(MODULES[name])
        if is_within(module, "moss_audio_jax.serving")
    ]
    assert wrong == []


def test_there_are_no_import_cycles():
    graph = {name: {module for module, _ in imports(path, of_functions=False)} for name, path in MODULES.items()}
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, which shows the cycle


def test_private_names_stay_in_their_module():
    wrong = [
        f"{importer} imports {name} of {module}"
        for importer, path in MODULES.items()
        for module, name in imports(path)
        if re.match(r"_[^_]", name)
    ]
    assert wrong == []


@pytest.mark.parametrize(
    "package",
    [
        *(name for name in MODULES if is_within(name, "train") and MODULES[name].stem == "__init__"),
        "moss_audio_jax.serving",
    ],
)
def test_maps_name_every_module(package: str):
    """The docstring of a package has a line for each of its modules."""
    docstring = ast.get_docstring(ast.parse(MODULES[package].read_text("utf-8"))) or ""
    listed = set(re.findall(r"^([a-z_]+)  ", docstring, re.MULTILINE))
    children = {name.removeprefix(f"{package}.") for name in MODULES if name.startswith(f"{package}.")}
    assert listed == {child for child in children if "." not in child}
