"""What README and docs/ tell a user to run is understood by what it names, and what they link to is there."""

import contextlib
import fnmatch
import glob
import importlib
import importlib.util
import re
import shlex
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest
import tyro
from run_scripts import expand, run_main, scalars

import kalei_mappo_mamujoco
from mamujoco_env import parse_env_id

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted({*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "published/README.md"})
OWN_ENVIRONMENT = "Meet"  # of docs/changing_a_script.md
PLACEHOLDERS = {"S": "1", "MODE": "full"}  # in a word of their own or in a part of a name between underscores


# ---- Reading the pages ----
def name_of(page):
    return str(page.relative_to(ROOT))


def shell_commands(text):
    """Lists of words, one a command, of a shell script. Redirections end a command."""
    commands = []
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;<>")
        lexer.whitespace_split = True
        words = []
        for word in [*lexer, ";"]:
            if set(word) <= set("&|;<>"):
                commands.append(words)
                words = []
            else:
                words.append(word)
    return commands


def commands_of(page):
    """What the page says to run of ours: (script, its arguments), from its blocks and from the code in its lines."""
    text = page.read_text()
    blocks = re.findall(r"^ *```bash\n(.*?)^ *```", text, re.M | re.S)
    prose = re.sub(r"^ *```.*?^ *```", "", text, flags=re.M | re.S)
    blocks += [
        span.replace("\n", " ")
        for span in re.findall(r"`([^`]+)`", prose)
        if re.match(r"(\w+=\S+ )?(python|torchrun) ", span)
    ]
    copies = {}
    for words in (words for block in blocks for words in shell_commands(block)):
        if words[:1] == ["cp"]:
            copies[words[2]] = words[1]
            continue
        for place, word in enumerate(words):
            if re.fullmatch(r"((tools|benchmark)/)?\w+\.py", word):
                yield copies.get(word, word), [copies.get(each, fill_in(each)) for each in words[place + 1 :]]
                break


def fill_in(argument):
    return "_".join(PLACEHOLDERS.get(part, part) for part in argument.split("_"))


ALL_COMMANDS = [(page, *command) for page in PAGES for command in commands_of(page)]


# ---- Understanding a command ----
def parse_flags_of(script, arguments):
    """Through the script's own reading of its command line, but for runs that the reader is yet to make."""
    arguments = list(arguments)
    if "--resume" in arguments:
        place = arguments.index("--resume")
        del arguments[place : place + 2]
    args, _ = importlib.import_module(Path(script).stem).parse_args(arguments)
    if args.env_id not in (None, OWN_ENVIRONMENT):
        try:
            parse_env_id(args.env_id)
        except ValueError as error:
            sys.exit(str(error))


def parse_options_of(script, arguments):
    """(options, flags that are not the tool's own, what follows "--")."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    options_class = module.Options if hasattr(module, "Options") else module.Args
    options, others = tyro.cli(options_class, args=arguments[:end], return_unknown_args=True)
    return options, others, arguments[end + 1 :]


def understand(script, arguments):
    """Exits where a flag is wrong."""
    if script == "mamujoco_env.py":
        assert not arguments
        return
    if "/" not in script:
        parse_flags_of(script, arguments)
        return
    if script == "benchmark/emulate_bfloat16.py":
        understand(*arguments[:1], arguments[1:])
        return
    options, others, common = parse_options_of(script, arguments)
    name = Path(script).stem
    if name == "grid":
        for variant in options.variants:
            for env_id in options.env_ids:
                own = shlex.split(variant.partition("=")[2])
                parse_flags_of(options.script, ["--env-id", env_id, *common, *own])
    elif name == "compare_commits":
        for version in options.versions:
            commit, *own = version.partition("=")[2].split()
            assert re.fullmatch(r"HEAD(~\d+)?|[0-9a-f]{7,40}", commit), version
            understand("benchmark/training_speed.py", ["--scripts", *options.scripts, *own])
    elif name == "soak":
        parse_flags_of(options.script, others)
    elif name == "training_speed":
        for each in options.scripts:
            parse_flags_of(f"kalei_{each}_mamujoco.py", ["--env-id", options.env_id, *others])
    if name not in ("soak", "training_speed") and others or name != "grid" and common:
        sys.exit(f"{script} has no {others or common}")


@pytest.mark.parametrize(
    ("page", "script", "arguments"),
    ALL_COMMANDS,
    ids=[f"{name_of(page)}: {script} {shlex.join(arguments)}"[:120] for page, script, arguments in ALL_COMMANDS],
)
def test_a_command_is_understood(page, script, arguments):
    assert (ROOT / script).is_file()
    try:
        understand(script, arguments)
    except SystemExit as stop:
        assert not stop.code, f"{name_of(page)}: {script} {shlex.join(arguments)}"


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("kalei_matd3_mamujoco.py", "--env-ids Ant-v2-4x2"),
        ("kalei_mappo_mamujoco.py", "--env-id Ant-v2-3x2"),
        ("kalei_mappo_mamujoco.py", "--evaluate runs/RUN/model.pt --no-such-flag"),
        ("tools/grid.py", "--env-ids Ant-v2-4x2 --variants a=--no-such-flag"),
        ("tools/grid.py", "--env-ids Ant-v2-4x2 -- --sharing some"),
        ("benchmark/compare_commits.py", "--versions 'after=HEAD --no-such-flag'"),
        ("benchmark/soak.py", "--minutes 1 --no-such-flag"),
        ("benchmark/emulate_bfloat16.py", "kalei_mappo_mamujoco.py --no-such-flag"),
        ("benchmark/training_speed.py", "--modes fast"),
        ("tools/figures.py", "--runs runs/*__* --no-such-flag 1"),
    ],
)
def test_a_wrong_flag_is_found(script, arguments):
    with pytest.raises(SystemExit) as stop:
        understand(script, shlex.split(arguments))
    assert stop.value.code


def test_the_pages_name_both_scripts_and_all_benchmarks():
    named = {script for _, script, _ in ALL_COMMANDS}
    scripts = {"kalei_matd3_mamujoco.py", "kalei_mappo_mamujoco.py"}
    for folder in ("tools", "benchmark"):
        paths = ROOT.glob(f"{folder}/*.py")
        scripts |= {f"{folder}/{path.name}" for path in paths if '"__main__"' in path.read_text()}
    assert named >= scripts


# ---- Files ----
def test_files_that_commands_read_are_there():
    for page, script, arguments in ALL_COMMANDS:
        for argument in arguments:
            pattern = argument.rpartition("=")[2]  # of NAME=PATTERN
            if "/" in script and pattern.startswith(("published/runs/", "tests/reference/")):
                for each in expand(pattern):
                    assert glob.glob(str(ROOT / each)), f"{name_of(page)}: {script} {pattern}"


def headings(page):
    """Anchors of the page's headings, as GitHub makes them."""
    found = re.findall(r"^#+ (.*)$", re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


def test_the_site_has_all_pages_and_no_others():
    named = re.findall(r"^ +- [^:]+: (\w+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M)
    assert sorted(named) == sorted(path.name for path in ROOT.glob("docs/*.md"))


def test_pictures_of_pages_are_in_docs():
    """The site holds nothing else, though GitHub would show a picture from anywhere."""
    for page in ROOT.glob("docs/*.md"):
        for target in re.findall(r"!\[[^\]]*\]\(([^)\s]+)\)", page.read_text()):
            assert (page.parent / target).resolve().is_relative_to(ROOT / "docs"), f"{name_of(page)}: {target}"


def test_folders_of_published_runs_that_a_page_names_are_there():
    page = (ROOT / "docs/your_run_beside_ours.md").read_text()
    table = page.split("## Which folders")[1].split("\n## ")[0]
    patterns = re.findall(r"`(\S+__\S*\*)`", table)
    assert len(patterns) > 10
    for pattern in patterns:
        assert list(ROOT.glob(f"published/runs/{pattern}")), pattern


def test_the_python_of_a_page_runs():
    """Its models are those in published/runs."""
    for code in re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/your_run_beside_ours.md").read_text(), re.M | re.S):
        names = {}
        with contextlib.chdir(ROOT):
            exec(code, names)
        assert names["actions"].shape == (1, 4, 2) and names["obs"].shape == (1, 4, 115)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    text = re.sub(r"<!--.*?-->", "", page.read_text(), flags=re.S)
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"(?:src|href)=\"([^\"]+)\"", text)
    for target in targets:
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = unquote(target).partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        assert not anchor or anchor in headings(linked), target


def test_tables_are_tables():
    """A row that was wrapped into prose has its bars in the middle of lines."""
    for page in PAGES:
        text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
        for line in re.sub(r"`[^`]*`", "", text).splitlines():
            assert " | " not in line or line.lstrip().startswith("|"), f"{page.name}: {line}"


# ---- Changes to a script ----
def changed_copies():
    """(original, copy, its text) of every `cp` in docs/changing_a_script.md, with the diff that follows applied."""
    page = (ROOT / "docs/changing_a_script.md").read_text()
    for original, copy, diff in re.findall(r"^cp (\S+) (\S+)$.*?^```diff\n(.*?)^```", page, re.M | re.S):
        text = (ROOT / original).read_text()
        for hunk in diff.split("@@\n"):
            lines = [(line[:1], line[1:]) for line in hunk.splitlines()]
            before, after = ("".join(f"{line}\n" for sign, line in lines if sign != other) for other in ("+", "-"))
            assert text.count(before) == 1, f"{copy}: {before}"
            text = text.replace(before, after)
        yield original, copy, text


COPIES = list(changed_copies())
TINY = "--device cpu --num-threads 1 --total-timesteps 400 --num-envs 4 --hidden-size 16 --log-interval 100"
TINY_OF = {
    "kalei_matd3_mamujoco.py": "--warmup-steps 100 --batch-size 20 --train-interval 10 --updates-per-round 4",
    "kalei_mappo_mamujoco.py": "--rollout-steps 25",
}


@pytest.mark.parametrize(("original", "copy", "text"), COPIES, ids=[copy for _, copy, _ in COPIES])
def test_a_copy_with_the_changes_of_the_page_trains(original, copy, text, tmp_path, monkeypatch):
    (tmp_path / copy).write_text(text)
    spec = importlib.util.spec_from_file_location(Path(copy).stem, tmp_path / copy)
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, script)  # as Python's own import does
    spec.loader.exec_module(script)
    flags = [*TINY.split(), *TINY_OF[original].split()]
    own_environment = "MeetEnv" in text
    if own_environment:
        flags += [
            "--env-id",
            OWN_ENVIRONMENT,
            "--episode-limit",
            50,
            "--eval-episodes",
            2,
            "--checkpoint-interval",
            200,
        ]
    else:  # pictures of masks take seconds
        flags += ["--env-id", "HalfCheetah-v2-2x3", "--eval-episodes", 0]
    code, _, err = run_main(script, *flags, cwd=tmp_path)
    assert code == 0, err
    (folder,) = (tmp_path / "runs").glob(f"*__{Path(copy).stem}__1__*")
    logged = set(scalars(folder))
    assert "losses/actor_diversity" in logged
    assert len({tag for tag in logged if tag.startswith("agents/")}) == (2 if "agents/" in text else 0)
    if own_environment:
        assert {"charts/episodic_return", "charts/eval_return"} <= logged
        code, _, err = run_main(script, "--resume", folder, "--total-timesteps", 600, cwd=tmp_path)
        assert code == 0, err


# ---- The same thing said in two places ----
def test_the_page_of_mappo_names_all_that_a_run_logs(tmp_path):
    """The page of MATD3 has the same test in test_matd3_command_line.py."""
    flags = [*TINY.split(), *TINY_OF["kalei_mappo_mamujoco.py"].split(), "--env-id", "HalfCheetah-v2-2x3"]
    flags += ["--episode-limit", 30, "--eval-episodes", 2, "--actor-reset-interval", 150, "--actor-threshold-bias", 0]
    code, _, err = run_main(kalei_mappo_mamujoco, *flags, "--checkpoint-interval", 200, cwd=tmp_path)
    assert code == 0, err
    (folder,) = (tmp_path / "runs").iterdir()
    section = (ROOT / "docs/kalei_mappo.md").read_text().split("## What is logged")[1].split("\n## ")[0]
    documented = set(re.findall(r"`((?:charts|losses|coefficients|values|masks|resets)/\w+)`", section))
    assert documented == {*scalars(folder), "masks/actor"}


def test_each_published_run_is_in_one_row():
    rows = re.findall(r"^\|(.*)$", (ROOT / "docs/reproducing.md").read_text(), re.M)
    patterns = [pattern for row in rows for pattern in re.findall(r"`([^`\s]+__\*)`|`([^`\s]+_\*)`", row)]
    patterns = [first or second for first, second in patterns]
    folders = [path.name for path in (ROOT / "published/runs").iterdir() if path.is_dir()]
    for folder in folders:
        assert sum(fnmatch.fnmatchcase(folder, pattern) for pattern in patterns) == 1, folder
    for pattern in patterns:
        assert fnmatch.filter(folders, pattern), pattern


def test_pre_commit_takes_the_same_ruff():
    wanted = re.search(r"^ruff==(\S+)$", (ROOT / "requirements-dev.txt").read_text(), re.M)[1]
    assert f"rev: v{wanted} " in (ROOT / ".pre-commit-config.yaml").read_text()
