"""README says what is true: its tables are the generated ones, its commands exist, its links lead somewhere."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from vashista.engine.errors import ERRORS, SettingsError
from vashista.server.cli import cli
from vashista.server.reference import TABLES, errors_table, main, with_tables
from vashista.server.settings import Settings, load_settings

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = [(match[1], match[2]) for match in re.finditer(r"^```(\w*)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)]
DOCUMENTS = [path for path in (ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md")))]


def command_words(group: click.Group, path: str = "vashista") -> Iterator[str]:
    for name in group.list_commands(click.Context(group)):
        command = group.get_command(click.Context(group), name)
        if isinstance(command, click.Group):
            yield from command_words(command, f"{path} {name}")
        else:
            yield f"{path} {name}"


def shell_lines(document: Path = ROOT / "README.md") -> list[str]:
    blocks = re.findall(r"^```sh\n(.*?)^```", document.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    text = "".join(blocks).replace("\\\n", " ")
    return [line for line in text.splitlines() if line.strip() and not line.startswith("#")]


def commands(document: Path) -> list[str]:
    """Lines that start `vashista`, without what the shell makes of them: other commands' output, redirections."""
    lines = [re.sub(r"\$\([^)]*\)", "1", line) for line in shell_lines(document)]
    return [re.split(r" >| \|", line)[0] for line in lines if line.startswith("vashista ")]


@pytest.mark.parametrize("name", TABLES)
def test_a_table_in_the_readme_is_the_generated_one(name: str) -> None:
    table = re.search(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", README, re.DOTALL)
    assert table is not None
    assert table[1] == TABLES[name](), "run `make docs`"


def test_every_error_has_an_explanation_and_a_remedy_in_the_table() -> None:
    rows = errors_table().splitlines()[2:]
    assert [row.split("`")[1] for row in rows] == list(ERRORS)
    for row in rows:
        code, status, meaning, remedy = (cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1])
        assert re.fullmatch(r"`[a-z_]+`", code)
        assert re.fullmatch(r"-|[45]\d\d", status)
        assert meaning.endswith(".")
        assert remedy.endswith(".")


def test_a_stale_table_is_written_anew_and_a_missing_place_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text("".join(f"a\n<!-- {name} -->\nstale row\n<!-- /{name} -->\nb\n" for name in TABLES))
    assert main([str(path)]) == 0
    text = path.read_text()
    assert "stale row" not in text
    assert with_tables(text) == text
    assert text.count("a\n<!--") == text.count("-->\nb\n") == len(TABLES)
    with pytest.raises(SettingsError, match="no place for the table of settings"):
        with_tables("nothing")


@pytest.mark.parametrize("words", list(command_words(cli)))
def test_every_command_is_in_the_readmes_table(words: str) -> None:
    assert f"| `{words}` |" in README


def test_there_are_vashista_commands_in_the_guides() -> None:
    assert {path.name for path in DOCUMENTS if len(commands(path)) > 3} >= {"README.md", "operator.md", "models.md"}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_vashista_command_in_a_code_block_parses(document: Path) -> None:
    for line in commands(document):
        words = shlex.split(line, comments=True)[1:]
        context: click.Context | None = None
        command: click.Command = cli
        while isinstance(command, click.Group):
            found = command.get_command(click.Context(command, parent=context), words.pop(0))
            assert found is not None, line
            command = found
        context = command.make_context(command.name, words)
        given = {name: value for name, value in context.params.items() if name in Settings.model_fields}
        load_settings({name: value for name, value in given.items() if value is not None}, {}, defaults={"model": "."})


def test_every_make_target_in_a_code_block_exists() -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    used = [shlex.split(line, comments=True)[1] for line in shell_lines() if line.startswith("make ")]
    assert used
    assert set(used) <= set(targets)
    assert set(re.findall(r"`make ([a-z-]+)", README)) <= set(targets)


def test_the_operators_guide_names_verbs_metrics_and_files_that_there_are() -> None:
    guide = (ROOT / "docs/operator.md").read_text(encoding="utf-8")
    setup = (ROOT / "deploy/install/setup.sh").read_text(encoding="utf-8")
    verbs = set(re.findall(r"vashista-setup ([a-z]+)", guide))
    assert verbs >= {"status", "check", "rollback", "uninstall"}
    assert all(re.search(rf"^    {verb}\) {verb} ;;$", setup, re.MULTILINE) for verb in verbs)
    metrics = set(re.findall(r"`[^`]*\b(vashista_[a-z_]+)", guide))
    assert len(metrics) >= 3
    assert all(f"| `{name}` |" in TABLES["metrics"]() for name in metrics), metrics
    for name in re.findall(r"/current/share/(prometheus/[a-z.]+)", guide):
        assert (ROOT / "deploy" / name).is_file(), name


def test_code_blocks_are_well_formed() -> None:
    for language, block in BLOCKS:
        if language == "toml":
            load_settings(tomllib.loads(block), {})
        elif language == "python":
            compile(block, "README.md", "exec")
        else:
            assert language == "sh"
    bodies = [word for line in shell_lines() if line.startswith("curl") for word in shlex.split(line) if word[0] == "{"]
    assert bodies
    assert {json.loads(body)["model"] for body in bodies} == {"reference-26m"}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_relative_links_lead_to_files(document: Path) -> None:
    text = re.sub(r"^```.*?^```", "", document.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"[a-z]+:|#", link):
            assert (document.parent / link.split("#")[0]).exists(), link
