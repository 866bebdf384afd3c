"""README.md and docs/ are executed and looked up: what they show runs, what they name exists.

Every python block of a page runs, in order and in one namespace, in a process of its own that starts
in an empty directory with warnings as errors. A text block right below a python block is what that
block prints; `...` in it stands for anything. The examples that a page includes as whole files are run
by `test_examples.py`.
"""

import ast
import dataclasses
import doctest
import itertools
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import typer
import warm
import yaml
from conftest import in_background

import ckptmgr
from ckptmgr.cli.app import app

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.rglob("*.md"))]
RECIPES = [DOCS / "recipes.md", DOCS / "models.md"]
FENCE = re.compile(r"^( *)```(\S*)[^\n]*\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
INCLUDE = re.compile(r'^--8<-- "([^"]+)"$')
OUTPUT = doctest.OutputChecker()


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and the line of the page that the text starts at."""

    language: str
    text: str
    line: int
    follows: int
    """How many characters of prose lie between the block before it and this one."""

    @property
    def included(self):
        """The file that a block consists of, if it is nothing but an include."""
        found = INCLUDE.match(self.text.strip())
        return found and found[1]


def blocks(text):
    found, end = [], 0
    for match in FENCE.finditer(text):
        indent, language, body = match.groups()
        body = "".join(line.removeprefix(indent) for line in body.splitlines(keepends=True))
        line = text.count("\n", 0, match.start(3)) + 1
        found.append(Block(language, body, line, len(text[end : match.start()].strip())))
        end = match.end()
    return found


def prose(text):
    return FENCE.sub("", text)


def name(path):
    return path.relative_to(ROOT).as_posix()


def each_page(test):
    return pytest.mark.parametrize("page", PAGES, ids=name)(test)


# ---------------------------------------------------------------- the code runs

RUN = """
import contextlib, io, json, sys

found = json.loads(sys.argv[1])
page = {"__name__": "__main__"}
printed = []
for name, line, code in found:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile("\\n" * (line - 1) + code, name, "exec"), page)
    printed.append(out.getvalue())
json.dump(printed, sys.stdout)
"""


def run(found, page, directory):
    """What each python block of a page prints; fails with the traceback, in lines of the page."""
    code = [(name(page), block.line, block.text) for block in found]
    done = warm.run(["-W", "error", "-c", RUN, json.dumps(code)], cwd=directory)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def code_of(found):
    return [block for block in found if block.language == "python" and not block.included]


@pytest.mark.parametrize("page", [page for page in PAGES if code_of(blocks(page.read_text()))], ids=name)
def test_every_python_block_runs_and_prints_what_the_page_says(page, tmp_path):
    if page.name == "recipes.md" and in_background.args[0]:
        pytest.skip(in_background.kwargs["reason"])
    found = blocks(page.read_text())
    code = code_of(found)
    printed = dict(zip(code, run(code, page, tmp_path), strict=True))
    for block, below in itertools.pairwise(found):
        if block in printed and below.language == "text" and not below.follows:
            where = f"{name(page)}:{below.line}"
            same = OUTPUT.check_output(below.text, printed[block], doctest.ELLIPSIS)
            assert same, f"{where} says\n{below.text}\nand the block above it prints\n{printed[block]}"


def test_a_page_with_an_error_or_another_output_fails(tmp_path):
    """The checks above can fail."""
    page = ROOT / "README.md"
    good = blocks("```python\nx = 1\n```\nmore\n```python\nprint(x)\n```\n```text\n1\n```\n")
    assert [(block.language, block.line, block.follows) for block in good] == [
        ("python", 2, 0), ("python", 6, 4), ("text", 9, 0),
    ]  # fmt: skip
    assert run(good[:2], page, tmp_path) == ["", "1\n"]
    for bad in ("print(y)", "import warnings; warnings.warn('old')", "1 +"):
        with pytest.raises(AssertionError, match=r'File "README.md", line 7\b'):
            run([dataclasses.replace(good[1], text=bad, line=7)], page, tmp_path)
    assert not OUTPUT.check_output("2\n", "1\n", doctest.ELLIPSIS)


def test_the_languages_of_blocks_are_known():
    """A block in a language nobody checks would be a promise nobody keeps."""
    for page in PAGES:
        for block in blocks(page.read_text()):
            where = f"{name(page)}:{block.line}"
            assert block.language in ("python", "bash", "text"), f"{where} is a block of {block.language!r}"


def test_examples_on_the_page_are_files_that_compile():
    shown = [block.included for page in PAGES for block in blocks(page.read_text()) if block.included]
    for example in shown:
        ast.parse((DOCS / "examples" / example).read_text())
    assert {Path(example).stem for example in shown} >= {
        "example_libraries_adam", "optax_adam", "change_learning_rate", "schedule", "digits",
    }  # fmt: skip


# ---------------------------------------------------------------- what is named exists

MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))
PATH = re.compile(r"(?:(?:tests|docs|ckptmgr|benchmarks|\.ci)/[\w./-]*|Makefile|LICENSE|[\w.-]+\.(?:toml|yml))")


def commands(page):
    """Every command line of a page: in its bash blocks, and `make ...` in its prose."""
    text = page.read_text()
    for block in blocks(text):
        if block.language == "bash":
            yield from (line for line in block.text.splitlines() if line.strip() and not line.startswith("#"))
    yield from re.findall(r"`(make [^`]+)`", prose(text))


def problem(command):
    """What is wrong with a command line; None if all that it names is there."""
    words = command.partition("#")[0].split()
    program, arguments = words[0], words[1:]
    if program == "make":
        missing = [each for each in arguments if "=" not in each and each not in TARGETS]
        return f"there is no target {missing}" if missing else None
    if Path(program).name in ("python", "pytest"):
        files = [each.partition("::")[0] for each in arguments if each.endswith(".py") or "::" in each]
        missing = [each for each in files if not (ROOT / each).exists()]
        return f"there is no file {missing}" if missing else None
    if program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        wanted = re.findall(r"\[([\w,]+)\]", command)
        missing = [each for names in wanted for each in names.split(",") if each not in extras]
        return f"there is no extra {missing}" if missing else None
    if program == "ckptmgr":
        known = typer.main.get_command(app).commands
        if arguments[0] not in known:
            return f"there is no command {arguments[0]}"
        options = {name for each in known[arguments[0]].params for name in each.opts}
        missing = [each for each in arguments if each.startswith("-") and each not in options]
        return f"there is no option {missing}" if missing else None
    return f"{program} is a command this test does not know"


@each_page
def test_every_command_exists(page):
    assert [f"{each}: {wrong}" for each in commands(page) if (wrong := problem(each))] == []


def test_a_command_that_does_not_exist_is_found():
    for wrong in ("make nothing", "python docs/none.py", "pip install '.[none]'", "curl x"):
        assert problem(wrong), wrong
    for right in ("make demo", "make PYTHON=python3.12 test", "pip install .", "pytest tests/test_docs.py"):
        assert problem(right) is None, right


def anchors(page):
    """The anchors of a page: its headings, as GitHub and mkdocs make them, and the names it documents."""
    headings = re.findall(r"^#+ (.+)$", prose(page.read_text()), re.MULTILINE)
    slugs = {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}
    return slugs | set(re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE))


@each_page
def test_every_link_leads_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page.read_text())):
        parts = urlsplit(link)
        if parts.scheme:
            assert parts.scheme == "https", link
            continue
        target = page.parent / parts.path if parts.path else page
        assert target.exists(), f"{name(page)} links to {link}"
        if parts.fragment:
            assert parts.fragment in anchors(target), f"{name(page)} links to {link}"


@pytest.mark.parametrize("page", RECIPES, ids=name)
def test_the_list_of_recipes_is_that_of_its_headings(page):
    text = prose(page.read_text())
    assert re.findall(r"^- \[(.+)\]\(#", text, re.MULTILINE) == re.findall(r"^## (.+)$", text, re.MULTILINE)


@each_page
def test_every_file_and_test_that_is_named_exists(page):
    for named in re.findall(r"`([^`\n]+)`", prose(page.read_text())):
        path, _, function = named.partition("::")
        if not PATH.fullmatch(path):
            continue
        assert (ROOT / path).exists(), f"{name(page)} names {named}"
        if function:
            assert f"def {function}(" in (ROOT / path).read_text(), f"{name(page)} names {named}"


def test_every_public_name_is_in_the_reference():
    shown = re.findall(r"^::: ckptmgr\.(\w+)$", (DOCS / "api.md").read_text(), re.MULTILINE)
    assert sorted(shown) == sorted([*ckptmgr.__all__, "interop", "testing"])


def test_every_room_has_its_line_in_the_design_notes():
    lines = re.findall(r"^\| `(ckptmgr/[\w.]+)/?` \|", (DOCS / "design.md").read_text(), re.MULTILINE)
    rooms = [
        name(path) for path in (ROOT / "ckptmgr").iterdir() if path.name[0] != "_" and path.name != "py.typed"
    ]
    assert sorted(lines) == sorted(rooms)


WORKFLOW = ROOT / ".github" / "workflows" / "test.yml"


def test_the_workflow_runs_the_commands_of_the_readme_on_every_python_that_is_named():
    jobs = yaml.safe_load(WORKFLOW.read_text())["jobs"]
    classified = re.findall(r"Python :: (3\.\d+)", (ROOT / "pyproject.toml").read_text())
    assert jobs["test"]["strategy"]["matrix"]["python"] == classified
    assert re.search(r"foreach v,([\d. ]+)", MAKEFILE)[1].split() == classified
    run = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    assert [each for each in run if each.startswith("make")] == [
        "make demo",
        "make test",
        "make oldest",
        "make docs",
    ]
    assert all(problem(each) is None for each in run if each.startswith("make"))


# ---------------------------------------------------------------- the site


def test_the_site_builds_without_a_warning_and_loads_nothing_from_elsewhere(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    for page in (tmp_path / "site").rglob("*.html"):
        loaded = re.findall(r'<(?:script|img|iframe)[^>]*src="(\w+:[^"]+)"', page.read_text())
        loaded += re.findall(r'<link[^>]*rel="(?:stylesheet|preconnect)"[^>]*href="(\w+:[^"]+)"', page.read_text())
        assert loaded == [], f"{page} loads {loaded}"
    assert "restore_or" in (tmp_path / "site" / "examples" / "index.html").read_text()  # the file is on the page
    reference = (tmp_path / "site" / "api" / "index.html").read_text()
    missing = [name for name in ckptmgr.__all__ if f'id="ckptmgr.{name}"' not in reference]
    assert missing == []
