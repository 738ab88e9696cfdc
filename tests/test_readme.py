"""The README says what is so: its blocks run, its commands are those of CI, its tables are the program's."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bnfold import errors
from bnfold.cli import run
from bnfold.cli.app import EXAMPLES

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = README + "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "samples").glob("*/README.md")))
EVERY_PAGE = {
    page: page.read_text(encoding="utf-8")
    for page in [ROOT / "README.md", *(p for room in ("bnfold", "samples", "tests") for p in sorted((ROOT / room).rglob("README.md")))]
}
TORCH = EVERY_PAGE[ROOT / "bnfold" / "backends" / "torch" / "README.md"]
PYTHON = re.findall(r"^```python\n(.*?)^```$", README + TORCH, re.MULTILINE | re.DOTALL)


def named(name: str) -> str:
    """The sh block behind the comment <!-- name: ... -->."""
    found = re.search(rf"^<!-- {name}:.*?^```sh\n(.*?)^```$", PAGES, re.MULTILINE | re.DOTALL)
    assert found, name
    return found[1]


def test_the_first_command_without_its_installation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(ROOT / "samples", tmp_path / "samples")
    monkeypatch.chdir(tmp_path)
    install, command = named("first").split("&&\n")
    assert "-c tests/constraints.txt" in install
    program, *arguments = command.split()
    assert program == ".venv/bin/bnfold"
    assert run(arguments) == 0
    assert (tmp_path / "digits-fused.onnx").is_file()
    shown = re.search(r"^<!-- shown:.*?^```\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    assert shown
    assert masked(capsys.readouterr().out) == masked(shown[1])


def test_the_commands_print_what_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """One after the other; "..." stands for lines that aren't shown."""
    shutil.copytree(ROOT / "samples", tmp_path / "samples")
    monkeypatch.chdir(tmp_path)
    shown = re.search(r"^<!-- run:.*?^```console\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    assert shown
    ran = set()
    for block in re.split(r"^\$ bnfold ", shown[1], flags=re.MULTILINE)[1:]:
        command, _, lines = block.partition("\n")
        ran.add(command.split()[0])
        status = run(command.split())
        assert status == (1 if lines.startswith("different") else 0)
        pattern = ".*".join(re.escape(masked(part).strip()) for part in lines.split("...\n"))
        assert re.fullmatch(pattern, masked(capsys.readouterr().out).strip(), re.DOTALL), command
    assert len(ran) >= 6


def test_what_is_said_of_other_tools_is_what_was_measured() -> None:
    """In the tables of the page of evidence."""
    evidence, rows = tables(EVERY_PAGE[ROOT / "tests" / "README.md"]), tables(README)
    measured = {row[0]: row[2:8] for row in evidence if row[1:2] == ["catalogue"]}
    told = [row for row in rows if row[0] in measured]
    assert len(told) == 10
    assert all(row[1:] == measured[row[0]] for row in told)
    right, wrong = (row for row in evidence if row[0] == "all")
    for row in (row for row in rows if row[0].endswith((f"of {right[1]}", f"of {wrong[1]}"))):
        whole = right if row[0].startswith("right") else wrong
        assert [row[1].split()[0], *row[2:]] == [whole[2].split()[0], whole[4], *whole[6:]]
    assert f"{wrong[2].split()[2]} of the defects are smaller than rounding" in README


def tables(page: str) -> list[list[str]]:
    """The rows of all tables."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("|")]


def masked(text: str) -> str:
    """What a command says but for its measured numbers, which another release of a library moves."""
    return re.sub(r"[▏▎▍▌▋▊▉█\s]+", " ", re.sub(r"[\d.]+(e-\d+)?", "N", text))


def test_ci_runs_the_two_commands_word_for_word(tmp_path: Path) -> None:
    """Its own extraction, on this README."""
    script = (ROOT / ".ci" / "run").read_text()
    function = script[script.index("block() {") : script.index("\n}\n") + 3]
    for name in ("first", "second"):
        command = ["bash", "-euc", f"{function}\nblock {name}"]
        assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout == named(name)
    assert "for name in first second" in script


def test_every_pin_is_exact_and_covers_what_is_installed_here() -> None:
    pins = {}
    for line in (ROOT / "tests" / "constraints.txt").read_text().splitlines():
        if not line.startswith("#"):
            name, version = line.split(";")[0].strip().split("==")
            pins[name] = version
    declared = re.findall(r'^\s*"([A-Za-z0-9_-]+)>=', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert declared
    assert {name.lower() for name in declared} <= pins.keys()


@pytest.mark.parametrize("number", range(len(PYTHON)))
def test_every_python_block_runs(number: int, tmp_path: Path) -> None:
    code = PYTHON[number]
    if "import torch" in code:
        pytest.importorskip("torch")
        pytest.importorskip("onnxscript")
    shutil.copytree(ROOT / "samples", tmp_path / "samples")
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    if "bnfold.verify" in code:
        assert done.stdout.splitlines()[-1] == "equivalent"
        assert done.stdout.count(" folded ") == 8


def test_the_ways_to_export_keep_the_batchnorms(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("onnxscript")
    import onnx

    (code,) = [block for block in PYTHON if "torch.onnx.export" in block]
    older = re.search(r"With the older exporter: `(.*?)`", TORCH)
    assert older
    for arguments in ("dynamo=True, optimize=False", older[1]):
        path = tmp_path / "kept.onnx"
        exported = code.replace("dynamo=True, optimize=False", arguments).replace('"model.onnx"', repr(str(path)))
        assert arguments in exported
        exec(exported, {"torch": torch})
        assert [node.op_type for node in onnx.load(path).graph.node if node.op_type != "Identity"] == ["Conv", "BatchNormalization"]


def test_the_table_of_statuses_is_the_contract() -> None:
    rows = {int(status) for status in re.findall(r"^\| (\d+) \|", README, re.MULTILINE)}
    raised = {kind.exit_status for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.BnfoldError)}
    assert rows == raised | {0, 6, 130}


def test_the_table_of_commands_is_complete() -> None:
    assert set(re.findall(r"^\| `bnfold ([\w-]+) ", README, re.MULTILINE)) == {*EXAMPLES}


def test_every_option_that_is_named_exists(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    for command in EXAMPLES:
        run([command.replace("_", "-"), "--help-all"])
    known = set(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out))
    prose = re.sub(r"```.*?```", "", "".join(EVERY_PAGE.values()), flags=re.DOTALL)
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py")]
    others = {option for text in sources for option in re.findall(r'add_argument\("(--[a-z-]+)"', text)}  # of the tests' own commands
    others |= {"--nproc-per-node", "--nnodes", "--rdzv-endpoint"}  # of torchrun
    assert set(re.findall(r"--[a-z][a-z-]+", prose)) <= known | {"--help", "--help-all", "--install-completion"} | others


def test_nothing_asks_an_index_for_bnfold() -> None:
    """It is on none: what is said to be installed is in a clone, or has an address."""
    files = [
        ROOT / "README.md",
        *(p for room in ("bnfold", "samples") for p in (ROOT / room).rglob("*") if p.suffix in (".py", ".md", ".yml")),
    ]
    asked = re.compile(r"install (?:-q |-U )?['\"]?bnfold(?:\[\w+\])?(?! @)['\"`;,\s]")
    assert asked.search("pip install 'bnfold[torch]'")
    assert not [path for path in files if asked.search(path.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("page", EVERY_PAGE, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", EVERY_PAGE[page]):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_every_page_is_led_to() -> None:
    """From the README, by links of pages."""
    led, found = [ROOT / "README.md"], set()
    while led:
        page = led.pop()
        if page not in found:
            found.add(page)
            targets = [(page.parent / target).resolve() for target in re.findall(r"\]\(([^)#:]+)\)", EVERY_PAGE[page])]
            led += {each / "README.md" if each.is_dir() else each for each in targets} & EVERY_PAGE.keys()
    assert found == EVERY_PAGE.keys()
