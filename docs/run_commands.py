"""Runs the commands of README.md and docs/*.md as they are written, in the order in which they are read.

    python docs/run_commands.py [PAGE ...]

Every page has a copy of the repository of its own, in which each command finds what the earlier ones made. A block
under `<!-- file: NAME -->` is the file NAME, one under `<!-- file: NAME, continued -->` the rest of it. `LISTED` has
all commands that are not run just so, with the reason. The first that fails ends the run.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LIMIT_S = 300.0
BLOCK = re.compile(
    r"(?:<!-- file: (?P<file>\S+?)(?P<continued>, continued)? -->\n)?^```(?P<language>\w*)\n(?P<body>[\s\S]*?)^```$"
    r"|^ {4}(?P<indented>(?:[A-Z_]+=\S+ )*(?:autopipe|python|torchrun) [^\n]*)$",
    flags=re.MULTILINE,
)


@dataclass(frozen=True, slots=True)
class Command:
    """A command of a page."""

    text: str


@dataclass(frozen=True, slots=True)
class File:
    """A file that a page shows, or the rest of one."""

    name: str
    text: str
    continued: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """A command that is not run just as it is written.

    Attributes:
        why: the reason.
        instead: what is run in its place, with the command for {command}; empty: nothing, where nothing has to come
            before it.
        before: what is run before it: the page says in words what is there.
        needs: a module without which it is left out.
    """

    why: str
    instead: str = ""
    before: str = ""
    needs: str = ""

    @property
    def is_left_out(self) -> bool:
        """Whether neither it nor anything in its place is run."""
        return not (self.instead or self.before or self.needs)


def items(page: Path) -> Iterator[Command | File]:
    """The files and commands of a page, in order."""
    for block in BLOCK.finditer(page.read_text()):
        if block["file"]:
            yield File(block["file"], block["body"], bool(block["continued"]))
        elif block["indented"]:
            yield Command(_without_comment(block["indented"]))
        elif block["language"] == "sh" and block["body"].startswith("#!"):
            yield Command(block["body"])
        elif block["language"] == "sh":
            lines = block["body"].replace("\\\n", " ").splitlines()
            yield from (Command(_without_comment(line)) for line in lines if line and not line.startswith("#"))


def _without_comment(line: str) -> str:
    return re.sub(r"\s+# .*", "", line).strip()


def listed(command: str) -> Listed | None:
    """What `LISTED` says of a command; a script is found by its beginning."""
    if command.startswith("#!"):
        return next((entry for key, entry in LISTED.items() if key.startswith("#!") and command.startswith(key)), None)
    return LISTED.get(command)


def copy_repository(folder: Path) -> None:
    """The repository as a clone of it would be, whose packages alone can be imported from anywhere, as after `pip
    install -e .`."""
    left_out = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build")
    shutil.copytree(ROOT, folder, ignore=left_out, dirs_exist_ok=True)
    (folder / ".packages").mkdir()
    for package in ("autopipe", "profiler"):
        (folder / ".packages" / package).symlink_to(folder / package)
    (folder / ".venv").symlink_to(sys.prefix)


def write(file: File, folder: Path) -> None:
    """Makes or continues a file of a page."""
    path = folder / file.name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a" if file.continued else "w") as out:
        out.write(file.text)


def run_page(page: Path, folder: Path) -> bool:
    """Runs the commands of a page; false where one fails, after its output."""
    copy_repository(folder)
    for item in items(page):
        if isinstance(item, File):
            write(item, folder)
            continue
        entry = listed(item.text)
        if entry is not None and (entry.is_left_out or (entry.needs and not importlib.util.find_spec(entry.needs))):
            print(f"- {_short(item.text)}\n    left out: {entry.why}", flush=True)
            continue
        parts = [item.text]
        if entry is not None:
            parts = [entry.before, (entry.instead or item.text).replace("{command}", item.text)]
        for text in filter(None, parts):
            print(f"+ {_short(text)}", flush=True)
            started = time.monotonic()
            status, output = run(text, folder)
            if status:
                print(f"{output}\n{page.name}: {_short(item.text)}\n    ended with {status}")
                return False
            print(f"    {time.monotonic() - started:.1f} s", flush=True)
    return True


def _short(text: str) -> str:
    return text.strip().replace("\n", "\n    ")


def run(text: str, folder: Path) -> tuple[int | str, str]:
    """Runs a command in a folder; its status, or what became of it, and what it wrote. Nothing that it starts is
    left."""
    environment = os.environ | {
        "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}",
        "PYTHONPATH": str(folder / ".packages"),
        "OMP_NUM_THREADS": "1",
        "AUTOPIPE_CACHE_DIR": str(folder.parent / "cache"),
        "PET_MASTER_PORT": str(_free_port()),  # torchrun's default is the same for all
        "FREE_PORT": str(_free_port()),
    }
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            ["bash", "-euo", "pipefail", "-c", text],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        status: int | str
        try:
            status = process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            status = f"no end after {LIMIT_S:.0f} s"
        finally:
            _kill_group(process)
        output.seek(0)
        return status, output.read()


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    finally:
        process.wait()


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def unused() -> list[str]:
    """Entries of `LISTED` whose command is on no page any more."""
    commands = [item.text for page in PAGES for item in items(page) if isinstance(item, Command)]
    entries = [listed(command) for command in commands]
    return [key for key, entry in LISTED.items() if not any(entry is e for e in entries)]


SET_UP = "python3 -m venv .venv && .venv/bin/pip install -q torch==2.13.0 && .venv/bin/pip install -q -e"
TRAIN = "OMP_NUM_THREADS=1 .venv/bin/torchrun --nproc-per-node 2 examples/train_gpt.py"
TWO_NODES = (
    "torchrun --nnodes 2 --nproc-per-node 4 --rdzv-backend c10d --rdzv-endpoint node0:29500 --rdzv-id run1 train.py"
)
HERE = TWO_NODES.replace("node0:29500", "localhost:$FREE_PORT").replace("--nproc-per-node 4", "--nproc-per-node 2")
SLURM = """
scontrol() { echo localhost; }
srun() { "${@/:29500/:$FREE_PORT}"; }
export SLURM_NNODES=1 SLURM_JOB_ID=1 SLURM_JOB_NODELIST=localhost
{command}"""
DEEPSPEED_CHECKPOINT = """
sed -n '/program: there/,/^```$/p' docs/migrate-deepspeed.md | grep -v -e '^```' -e '^<!--' > there.py
echo 'engine.save_checkpoint(".", tag="global_step100")' >> there.py
DS_ACCELERATOR=cpu torchrun --nproc-per-node 2 there.py
echo '{"0": "0", "2": "2", "4": "4"}' > names.json"""
SIZES = "autopipe profile examples/train_gpt.py:build --device h100 --quiet"

LISTED: dict[str, Listed] = {
    # README.md
    f"{SET_UP} . && {TRAIN}": Listed(why="sets up an environment", instead=f"{TRAIN} --steps 20"),
    f"{SET_UP} '.[test]' && OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q": Listed(why="`.ci/run` runs it"),
    f"{SET_UP} '.[hf]'": Listed(why="sets up an environment"),
    # user-guide.md
    "autopipe convert checkpoints model.safetensors": Listed(
        why="needs checkpoints, as `train.py` writes them", before="torchrun --nproc-per-node 2 train.py"
    ),
    "autopipe convert global_step100 layers --names names.json": Listed(
        why="needs a checkpoint of DeepSpeed", before=DEEPSPEED_CHECKPOINT, needs="deepspeed"
    ),
    TWO_NODES: Listed(why="two machines", instead=f"{HERE} & {HERE}; wait $!"),
    "#!/bin/bash\n#SBATCH": Listed(why="needs Slurm", instead=SLURM),
    # planner.md
    "autopipe plan --profile small.json,large.json --num-devices 64 --global-batch 512": Listed(
        why="needs two profiles",
        before=f"{SIZES} --num-microbatches 16 -o small.json; {SIZES} --num-microbatches 8 -o large.json",
    ),
    "autopipe plan --profile profile.json --cluster cluster.json --global-batch 512 --format json -o plan.json": Listed(
        why="needs a profile and a cluster",
        before=f"{SIZES} --num-microbatches 16 -o profile.json; "
        "sed -n '/file: cluster.json/,/^```$/p' docs/user-guide.md | grep -v -e '^```' -e '^<!--' > cluster.json",
    ),
    # measurements, of which a part is run
    **{
        command: Listed(why="takes minutes to hours", instead=part)
        for command, part in {
            "OMP_NUM_THREADS=1 python benchmarks/planner.py --json planner.json": "python benchmarks/planner.py --only large --time-budget-s 1 --json planner.json",
            "python benchmarks/planner.py --only recompute": "python benchmarks/planner.py --only recompute --time-budget-s 1",
            "python benchmarks/planner.py --brute-force 500": "python benchmarks/planner.py --brute-force 3",
            "OMP_NUM_THREADS=1 python benchmarks/search.py --memory-gib 80 --grid": "python benchmarks/search.py --memory-gib 80 --devices 4 --layers 4",
            "python benchmarks/prediction.py -o prediction.json --only gpt,llama": "python benchmarks/prediction.py -o prediction.json --only lopsided --tries 1",
            "python benchmarks/prediction.py -o memory.json --tries 1": "python benchmarks/prediction.py -o memory.json --only lopsided --tries 1",
            "python benchmarks/prediction.py -o computes.json --cpu-time --tries 3": "python benchmarks/prediction.py -o computes.json --only lopsided --cpu-time --tries 1",
            "python benchmarks/saved_bytes.py": "python benchmarks/saved_bytes.py gpt",
            "python benchmarks/engine.py": "python benchmarks/engine.py divide --rounds 1",
            "python benchmarks/capture_coverage.py transformers hard": "python benchmarks/capture_coverage.py transformers hard --only gpt2 tied",
            "python benchmarks/capture_coverage.py --peers transformers hard torchvision timm": "python benchmarks/capture_coverage.py --peers hard --only tied",
            "python benchmarks/capture_large.py": "python benchmarks/capture_large.py --length 64 --tries 1",
            "python -m benchmarks.durability reshard --optimizers adamw": "python -m benchmarks.durability reshard --optimizers adamw --layouts 1 2",
            'python -m benchmarks.durability reshard --optimizers sgd --layouts 1 3 2x2 "1x2 zero"': 'python -m benchmarks.durability reshard --optimizers sgd --layouts 1 "1x2 zero"',
            "python -m benchmarks.durability crash": "python -m benchmarks.durability crash --crashes 4",
            "python -m benchmarks.durability faults": "python -m benchmarks.durability faults --count 2",
            "python -m benchmarks.durability memory": "python -m benchmarks.durability memory --width 512 --layers 6 --ranks 2",
            "python -m benchmarks.durability saving": "python -m benchmarks.durability saving --repeats 1",
        }.items()
    },
    # other environments
    "python benchmarks/comparison_deepspeed.py": Listed(why="needs DeepSpeed", needs="deepspeed"),
    "pip install deepspeed tabulate": Listed(why="sets up an environment"),
    "pip install -e '.[hf]' pillow scipy": Listed(why="sets up an environment"),
    "python benchmarks/capture_coverage.py torchvision timm": Listed(
        why="an environment with torchvision and timm", needs="timm"
    ),
    "python -m pytest tests/gloo tests/single": Listed(why="`.ci/run` runs it"),
}


def main() -> int:
    pages = [Path(name).resolve() for name in sys.argv[1:]] or PAGES
    for key in unused():
        print(f"docs/run_commands.py lists a command that no page has: {key}")
        return 1
    for page in pages:
        print(f"\n{page.relative_to(ROOT)}", flush=True)
        with tempfile.TemporaryDirectory(prefix="autopipe-docs-") as folder:
            if not run_page(page, Path(folder) / "autopipe"):
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
