"""What the house does not do, found by reading the syntax tree of every product file."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(
    p.relative_to(ROOT).as_posix() for top in ("mmdiff", "data_pipelines", "eval") for p in (ROOT / top).rglob("*.py")
)
MAX_FILE, MAX_FUNCTION = 600, 80
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)

HEAVY = {"transformers", "diffusers", "timm", "open_clip", "webdataset", "torchvision", "peft", "scipy", "accelerate"}
"""Seconds each; imported inside the function that needs them."""

BANNED_MODULES = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "pdb", "yaml", "pty"}
BANNED_CALLS = {
    r"(.*\.)?cuda": "say .to(device)",
    r"eval|exec|compile": "nothing that is read runs code",
    r"os\.(system|popen|exec\w*|spawn\w*)": "nothing starts a shell",
    r"breakpoint": "left over from debugging",
    r"sys\.path\.\w+": "packages are installed, paths are not edited",
    r"(np|numpy)\.random\.(?!RandomState|Generator|PCG64|SeedSequence).*": "draw through mmdiff.rng",
    r"random\.(?!Random$)\w+": "draw through mmdiff.rng",
    r"torch\.(manual_seed|seed|set_rng_state|cuda\.manual_seed(_all)?|set_default_dtype|set_default_device)": (
        "global state belongs to the user"
    ),
}
NEEDS_GENERATOR = r"torch\.(rand|randn|randint|randperm|multinomial|bernoulli|normal|poisson)(_like)?"

ONLY_IN = {
    "torch.load": (r"mmdiff/io/checkpoint\.py", "one file opens foreign pickles, and only their tensors"),
    "print": (r"mmdiff/(cli\.py|commands/.*)", "results and messages are the commands' business"),
}
SWALLOWS = {
    "mmdiff/training/reporters.py": "a service that fails is told once and left out; no run depends on it",
    "data_pipelines/fetch.py": "the skip point: counts, records and replaces the sample",
    "data_pipelines/prefetch.py": "hands the error over to the consumer, which raises it",
}
"""The only files where ``except Exception`` need not raise."""


def tree_of(path: str) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"))


def calls(tree: ast.AST) -> Iterator[tuple[ast.Call, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield node, ast.unparse(node.func)


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    yield from (node for node in ast.walk(tree) if isinstance(node, FUNCTION))


def banned_modules(path: str, tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [str(node.module)]
        yield from (f"{path}:{node.lineno} imports {n}" for n in names if n.split(".")[0] in BANNED_MODULES)


def banned_calls(path: str, tree: ast.AST) -> Iterator[str]:
    for node, name in calls(tree):
        for pattern, why in BANNED_CALLS.items():
            if re.fullmatch(pattern, name):
                yield f"{path}:{node.lineno} calls {name}: {why}"
        files, why = ONLY_IN.get(name, (".*", ""))
        if not re.fullmatch(files, path):
            yield f"{path}:{node.lineno} calls {name}: {why}"


def banned_arguments(path: str, tree: ast.AST) -> Iterator[str]:
    for node, name in calls(tree):
        for keyword in node.keywords:
            on = isinstance(keyword.value, ast.Constant) and keyword.value.value is True
            if on and keyword.arg in ("trust_remote_code", "shell", "allow_pickle"):
                yield f"{path}:{node.lineno} says {keyword.arg}=True in {name}"
        given = {k.arg for k in node.keywords}
        if re.fullmatch(NEEDS_GENERATOR, name) and "generator" not in given:
            yield f"{path}:{node.lineno} calls {name} without a generator"
        if name == "torch.load" and "weights_only" not in given:
            yield f"{path}:{node.lineno} calls torch.load without weights_only"


def asserts(path: str, tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert) and not re.search(r"is not None|isinstance\(", ast.unparse(node.test)):
            yield f"{path}:{node.lineno} asserts; raise an error of mmdiff.errors (or ValueError) instead"


def swallowed_errors(path: str, tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.ExceptHandler) or path in SWALLOWS:
            continue
        kinds = ast.unparse(node.type) if node.type else "everything"
        wide = kinds == "everything" or re.search(r"\b(Exception|BaseException)\b", kinds)
        if wide and not any(isinstance(n, ast.Raise) for n in ast.walk(node)):
            yield f"{path}:{node.lineno} catches {kinds} and does not raise"


def heavy_imports(path: str, tree: ast.Module) -> Iterator[str]:
    for node in tree.body:
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [str(node.module)]
        for name in names:
            if name.split(".")[0] in HEAVY:
                yield f"{path}:{node.lineno} imports {name} at the top; import it where it is needed"


def sizes(path: str, tree: ast.AST) -> Iterator[str]:
    lines = len((ROOT / path).read_text(encoding="utf-8").splitlines())
    if lines > MAX_FILE:
        yield f"{path} has {lines} lines, at most {MAX_FILE}: what second thing does it do?"
    for node in functions(tree):
        length = (node.end_lineno or 0) - node.lineno + 1
        if length > MAX_FUNCTION:
            yield f"{path}:{node.lineno} {node.name} has {length} lines, at most {MAX_FUNCTION}"


def public(body: list[ast.stmt]) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    for node in body:
        if isinstance(node, (*FUNCTION, ast.ClassDef)) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from public(node.body)


def missing_docstrings(path: str, tree: ast.Module) -> Iterator[str]:
    if not ast.get_docstring(tree):
        yield f"{path} has no docstring: what lives here, and what does not?"
    for node in public(tree.body):
        overload = any(ast.unparse(d) in ("overload", "override", "typing.overload") for d in node.decorator_list)
        if not ast.get_docstring(node) and not overload and not ast.unparse(node).rstrip().endswith("..."):
            yield f"{path}:{node.lineno} {node.name} has no docstring"


def undocumented_config_fields(path: str, tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.ClassDef) or "config" not in map(ast.unparse, node.decorator_list):
            continue
        for field, after in zip(node.body, [*node.body[1:], None], strict=True):
            if isinstance(field, ast.AnnAssign) and ast.unparse(field.target) != "type":
                if not (isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)):
                    yield f"{path}:{field.lineno} {node.name}.{ast.unparse(field.target)} has no docstring line"


def missing_annotations(path: str, tree: ast.AST) -> Iterator[str]:
    for node in functions(tree):
        a = node.args
        given = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, [a.vararg, a.kwarg])]
        bare = [x.arg for x in given if x.annotation is None and x.arg not in ("self", "cls")]
        if bare:
            yield f"{path}:{node.lineno} {node.name}: no annotation of {', '.join(bare)}"
        if node.returns is None:
            yield f"{path}:{node.lineno} {node.name}: no annotation of the result"


def wrong_text(path: str, tree: ast.AST) -> Iterator[str]:
    text = (ROOT / path).read_text(encoding="utf-8")
    if Path(path).name == "utils.py":
        yield f"{path}: name the file after what it does"
    if "from __future__ import annotations" not in text and any(functions(tree)):
        yield f"{path}: must start with `from __future__ import annotations`"
    for i, line in enumerate(text.splitlines(), 1):
        if re.search(r"[\"'](/home|/root|/work|/mnt|/data|/opt|/Users|/tmp)\b", line):
            yield f"{path}:{i} holds an absolute path"
        if re.search(r"\b(TODO|FIXME|XXX)\b(?!\(#\d+\))", line):
            yield f"{path}:{i} says TODO without the number of an issue"
        if re.search(r"#\s*type:\s*ignore(?!\[)|#\s*noqa(?!: )", line):
            yield f"{path}:{i} silences a checker without saying which rule"


RULES: list[Callable[[str, ast.Module], Iterator[str]]] = [
    banned_modules,
    banned_calls,
    banned_arguments,
    asserts,
    swallowed_errors,
    heavy_imports,
    sizes,
    missing_docstrings,
    undocumented_config_fields,
    missing_annotations,
    wrong_text,
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_product_code_keeps_the_rule(rule: Callable[[str, ast.Module], Iterator[str]]) -> None:
    found = [sentence for path in FILES for sentence in rule(path, tree_of(path))]
    assert not found, "\n" + "\n".join(found)


BAD = [
    (banned_modules, "import pickle"),
    (banned_modules, "from yaml import safe_load"),
    (banned_calls, "x.cuda()"),
    (banned_calls, "eval('1')"),
    (banned_calls, "os.system('ls')"),
    (banned_calls, "sys.path.insert(0, '.')"),
    (banned_calls, "np.random.rand(3)"),
    (banned_calls, "random.shuffle(x)"),
    (banned_calls, "torch.manual_seed(0)"),
    (banned_calls, "torch.load('x', weights_only=True)"),
    (banned_calls, "print(1)"),
    (banned_arguments, "f(trust_remote_code=True)"),
    (banned_arguments, "subprocess.run('ls', shell=True)"),
    (banned_arguments, "torch.rand(3)"),
    (banned_arguments, "torch.load('x')"),
    (asserts, "assert x > 0"),
    (swallowed_errors, "try:\n    f()\nexcept Exception:\n    pass"),
    (swallowed_errors, "try:\n    f()\nexcept:\n    pass"),
    (heavy_imports, "import timm.models"),
    (sizes, "def f():\n" + "    x = 1\n" * 80),
    (missing_docstrings, '"""M."""\ndef f(): x = 1'),
    (missing_docstrings, '"""M."""\nclass A:\n    """A."""\n    def f(self): x = 1'),
    (undocumented_config_fields, "@config\nclass A:\n    x: int = 0\n    y: int = 0\n    'text'"),
    (missing_annotations, "def f(x) -> None: x"),
    (missing_annotations, "def f(self, *args: int): x"),
]


@pytest.mark.parametrize(("rule", "source"), BAD, ids=range(len(BAD)))
def test_rule_finds_what_it_is_for(rule: Callable[[str, ast.Module], Iterator[str]], source: str) -> None:
    assert len(list(rule("mmdiff/errors.py", ast.parse(source)))) == 1


GOOD = [
    (banned_calls, "random.Random(3)\nnp.random.RandomState(3)\nmodel.eval()\nre.compile('x')"),
    (banned_arguments, "torch.rand(3, generator=g)\nf(shell=False)"),
    (asserts, "assert x is not None"),
    (swallowed_errors, "try:\n    f()\nexcept Exception as e:\n    raise ValueError from e"),
    (heavy_imports, "def f():\n    import timm"),
    (undocumented_config_fields, "@config\nclass A:\n    type: Literal['a'] = 'a'\n    x: int = 0\n    'text'"),
]


@pytest.mark.parametrize(("rule", "source"), GOOD, ids=range(len(GOOD)))
def test_rule_leaves_the_rest_alone(rule: Callable[[str, ast.Module], Iterator[str]], source: str) -> None:
    assert not list(rule("mmdiff/errors.py", ast.parse(source)))


def test_tests_folder_is_no_package() -> None:
    assert not list((ROOT / "tests").rglob("__init__.py")), "tests are found by path; a package named tests clashes"
