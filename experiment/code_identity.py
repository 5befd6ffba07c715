"""Which code made a file: the script's name and a digest of its code, so that a changed copy's files are told apart."""

import ast
import functools
import hashlib
import sys
from pathlib import Path

from experiment.command_line import fail, warn

ROOT = Path(__file__).resolve().parent.parent


@functools.cache  # edits made during a run do not count
def identity(args_class):
    """{"script": file name, "code": digest} of the script that defines args_class, as it is at the first call.

    The digest covers the code that decides results: the script and the modules and packages that it imports from its
    own folder or this repository, without experiment/. Comments, docstrings and layout do not count, nor do empty
    fields of the syntax tree, which newer Pythons add. Still, another Python may give the same code another digest.
    """
    files, digest = [Path(sys.modules[args_class.__module__].__file__).absolute()], hashlib.sha256()
    for path in files:  # which grows
        tree = ast.parse(path.read_bytes())
        digest.update(repr(plain(tree)).encode())
        for node in ast.walk(tree):
            start = f"{node.module}." if getattr(node, "module", None) else ""
            names = [start + x.name for x in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            # `from a.b import c` may run a/__init__.py, a/b.py and a/b/c.py
            for parts in (name.split(".")[: i + 1] for name in names for i in range(name.count(".") + 1)):
                places = [folder.joinpath(*parts) for folder in (path.parent, files[0].parent, ROOT)]
                found = [file for x in places for file in (x / "__init__.py", x.with_suffix(".py")) if file.is_file()]
                files += [file for file in found[:1] if file not in files and parts[0] != "experiment"]
    return {"script": files[0].name, "code": digest.hexdigest()[:16]}


def plain(node):
    """A syntax tree as nested tuples and lists, without empty fields and without statements that are constants."""
    if isinstance(node, list):
        return [plain(x) for x in node if not (isinstance(x, ast.Expr) and isinstance(x.value, ast.Constant))]
    if isinstance(node, ast.AST):
        return type(node).__name__, [(k, plain(x)) for k, x in ast.iter_fields(node) if x is not None and x != []]
    return node


def compare(found, args_class):
    """(True if another script made a file, how its code differs or ""). `found`: a dict that holds its identity."""
    own, script = identity(args_class), found.get("script")
    if found.get("code") == own["code"]:
        return False, ""
    if script is None:
        return False, f"does not say which code made it, perhaps not {own['script']} as it is now"
    if script == own["script"]:
        return False, f"was made by {script} before its code changed"
    return True, f"was made by {script}, expected a file of {own['script']}"


def check_identity(found, args_class, path):
    """Fail if another script made the file, and warn if the code has changed since."""
    another_script, difference = compare(found, args_class)
    if difference:
        (fail if another_script else warn)(f"{path} {difference}")
