"""What the documents point to is there: links, files, commands with their options, metrics, settings, make's verbs."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from tandem_serve.cli import app
from tandem_serve.config import ClusterConfig

ROOT = Path(__file__).resolve().parents[2]
HISTORY = "lab-notes.md"  # tells of commands and files as they were
DOCUMENTS = [*ROOT.glob("*.md"), *(file for file in (ROOT / "docs").glob("*.md") if file.name != HISTORY)]
documents = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: file.name)


def code(document: Path) -> Iterator[str]:
    """Lines of code blocks, continued ones joined, and inline code."""
    blocks = re.split(r"^ *```.*\n", document.read_text(), flags=re.MULTILINE)
    for number, block in enumerate(blocks):
        if number % 2:
            yield from block.replace("\\\n", " ").splitlines()
        else:
            yield from re.findall(r"`([^`]+)`", block)


@documents
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = document.parent / path if path else document
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


def anchors(file: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@documents
def test_files_are_there(document: Path) -> None:
    named = re.compile(r"(?<![\w/.<-])((?:[\w.-]+/)*[\w-]+\.(?:py|sh|proto|toml))(?![\w/])")
    missing = {name for name in named.findall(document.read_text()) if not any(matching(name))}
    assert missing <= {"utils.py"}, "of which the rules say that there shall be none"


def matching(name: str) -> Iterator[Path]:
    folders = [ROOT / top for top in ("tandem_serve", "tests", "scripts", "protos", "docker", "benchmarks")]
    yield from (each for each in (ROOT / name,) if each.is_file())
    for folder in folders:
        yield from folder.rglob(name)


@documents
def test_commands_and_their_options_exist(document: Path) -> None:
    for line in code(document):
        for words in re.findall(r"(?:^|[\s;&(])tandem-serve ([^|;&>#]*)", line):
            arguments = shlex.split(words.replace("...", ""))
            command, rest = resolve(arguments)
            known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
            used = {word.split("=")[0] for word in rest if word.startswith("--")}
            assert used <= known | {"--help"}, f"{line}: {used - known}"


def resolve(words: list[str]) -> tuple[Any, list[str]]:
    """The command that is called, `primary|drafter` being two of them, and what is left for it."""
    command: Any = get_command(app)
    while hasattr(command, "commands") and words and not words[0].startswith("-"):
        names, words = words[0].split("|"), words[1:]
        assert set(names) <= set(command.commands), f"{names} are not in {sorted(command.commands)}"
        command = command.commands[names[0]]
    return command, words


@documents
def test_metrics_exist(document: Path) -> None:
    for name in re.findall(r"\b(?:tandem|vllm):\w+", document.read_text()):
        assert name.removesuffix("_total").removesuffix("_bucket") in exported(), name


@cache
def exported() -> str:
    return "".join(file.read_text() for file in (ROOT / "tandem_serve").rglob("*metrics.py"))


@documents
def test_settings_exist(document: Path) -> None:
    schema = ClusterConfig.model_json_schema()
    for path in re.findall(
        r"`((?:router|primary|drafter|observability)(?:\.(?!safetensors|py)\w+)+)`", document.read_text()
    ):
        assert is_setting(schema, path.split("."), schema), path


def is_setting(schema: dict[str, Any], path: list[str], whole: dict[str, Any]) -> bool:
    if not path:
        return True
    if "$ref" in schema:
        return is_setting(whole["$defs"][schema["$ref"].split("/")[-1]], path, whole)
    alternatives = [*schema.get("anyOf", ()), *schema.get("oneOf", ()), *schema.get("allOf", ())]
    if any(is_setting(each, path, whole) for each in alternatives):
        return True
    inner = schema.get("properties", {}).get(path[0])
    return inner is not None and is_setting(inner, path[1:], whole)


@documents
def test_verbs_of_make_exist(document: Path) -> None:
    verbs = set(re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for line in code(document):
        assert set(re.findall(r"^make ([a-z-]+)", line)) <= verbs, line
