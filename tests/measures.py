"""What keeps the package readable, measured: `python tests/measures.py`.

It ends with 1, and names the places, where a file or a function is too long, a function
has too many parameters, two files have one name, a test file has no module, or a word
is used that the project has a better one for.
"""

import ast
import io
import re
import sys
import tokenize
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "gradient_accumulator"
FILE_LINES = 500
FUNCTION_LINES = 60  # without the docstring
PARAMETERS = 7
# No more than there are, so that the package does not grow unnoticed.
PACKAGE_LINES = 13150
# Words that say too little. CONTRIBUTING.md has those to write instead.
WORDS = ("piece", "told", "worth", "mark", "together", "apart", "made_to_train")
IN_NAMES = "same"  # good English in a sentence, but no name
# Of folders, of the command line, and of the commands of contributors.
OTHER_TESTS = {"engine", "devices", "compat", "cli", "running", "init"}
# Parameters of public functions stay as their users write them.
PUBLIC = {
    "accumulate",
    "AccumBatchNormalization",
    "GradientAccumulateModel",
    "GradientAccumulateOptimizer",
}


def main():
    found = [
        *too_long_files(),
        *too_long_functions(),
        *too_many_parameters(),
        *equal_names(),
        *tests_without_module(),
        *words(),
    ]
    lines = sum(len(text.splitlines()) for _, text in sources(PACKAGE))
    print(f"{lines} lines in {len(list(PACKAGE.rglob('*.py')))} files")
    if lines > PACKAGE_LINES:
        found.append(f"the package: {lines} lines, more than {PACKAGE_LINES}")
    print(*found, sep="\n")
    sys.exit(1 if found else 0)


def sources(folder):
    for path in sorted(folder.rglob("*.py")):
        yield path.relative_to(ROOT), path.read_text()


def functions():
    """Each function of the package, with its file, its class, and its node."""
    for path, text in sources(PACKAGE):
        for parent in ast.walk(ast.parse(text)):
            for node in ast.iter_child_nodes(parent):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    yield path, parent, node


def too_long_files():
    for folder in (PACKAGE, ROOT / "tests"):
        for path, text in sources(folder):
            if (count := len(text.splitlines())) > FILE_LINES:
                yield f"{path}: {count} lines, more than {FILE_LINES}"


def too_long_functions():
    for path, _, node in functions():
        count = node.end_lineno - node.lineno + 1
        if ast.get_docstring(node) is not None:
            docstring = node.body[0]
            count -= docstring.end_lineno - docstring.lineno + 1
        if count > FUNCTION_LINES:
            where = f"{path}:{node.lineno}: {node.name}"
            yield f"{where}: {count} lines, more than {FUNCTION_LINES}"


def too_many_parameters():
    for path, parent, node in functions():
        arguments = node.args
        every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        count = sum(each.arg not in ("self", "cls") for each in every)
        owner = getattr(parent, "name", None)
        if count > PARAMETERS and not {node.name, owner} & PUBLIC:
            where = f"{path}:{node.lineno}: {node.name}"
            yield f"{where}: {count} parameters, more than {PARAMETERS}"


def equal_names():
    names = Counter(
        path.name for path, _ in sources(PACKAGE) if path.name != "__init__.py"
    )
    for name, count in names.items():
        if count > 1:
            yield f"{name}: the name of {count} files"


def tests_without_module():
    modules = {path.stem for path, _ in sources(PACKAGE)} | OTHER_TESTS
    for path, _ in sources(ROOT / "tests"):
        name = path.stem.removeprefix("test_")
        known = any(f"{name}_".startswith(f"{module}_") for module in modules)
        if path.parent.name == "tests" and path.stem != name and not known:
            yield f"{path}: no module of the package begins its name"


def words():
    wanted = "|".join(WORDS)
    name = re.compile(rf"(?<![a-zA-Z])({wanted}|{IN_NAMES})(?![a-zA-Z])")
    prose = re.compile(rf"\b({wanted})\b", re.IGNORECASE)
    for path, text in sources(PACKAGE):
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            pattern = name if token.type == tokenize.NAME else prose
            if token.type not in (tokenize.NAME, tokenize.STRING, tokenize.COMMENT):
                continue
            for line, part in enumerate(token.string.splitlines(), token.start[0]):
                for word in pattern.findall(part):
                    yield f"{path}:{line}: a word to replace: {word!r}"


if __name__ == "__main__":
    main()
