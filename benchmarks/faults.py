"""Runs that are killed, cut from power, or find damaged files or a full disk: do they end with the same bits?

    python -m benchmarks.faults [--tries N] [--seconds S] [--seed N] [--only NAME] --json FILE

Every try starts from finished stages, runs the next ones in a child forked from this warm process, lets a
fault happen, and runs again without one. Good is: the same bits as without a fault, or one line and exit 2.
Seeds of bad tries are told and kept in the JSON.

kill: SIGKILL before a drawn file operation, or after a drawn time. publish: the same, while the results of
an edited recipe replace older ones; what stands under the published name is the old or the new one, whole.
power: the kill, and unsynced writes are dropped or torn. torn: the kill, and a file of unfinished work is
damaged. disk: no write succeeds from a drawn operation on. sources: any of these but publish, while a GGUF
file or a model of another precision is converted into the workspace, where torn damages finished copies too.
exports, tuning: any of these, while the merged model is exported, or the dense one tuned before it is made
sparse.
"""

import random
import shutil
import tempfile
import time
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path

from benchmarks.campaign import Campaign, campaign_parser
from benchmarks.common import parse_options
from benchmarks.faulty_disk import Shadow, damage, fail, kill, watch
from benchmarks.tiny import LEVELS, write_model, write_recipe
from benchmarks.warm import import_everything, run_child

from sqft.artifacts import digest_files
from sqft.cli import run_command_line
from sqft.pipeline import load_recipe
from sqft.pipeline.runner import stage_keys
from sqft.report import page

AIMS = {
    "kill": 300, "publish": 53, "power": 100, "torn": 200, "disk": 50, "sources": 50, "exports": 50,
    "tuning": 50,
}  # fmt: skip
FAULTS = ("kill", "power", "torn", "disk")
MERGED = "train, search and merge"
EXPORTS = ("safetensors", "compressed-tensors", "gptq", "gguf", "openvino")
# What each level starts from: the state that another one ended in, or nothing.
BEFORE: dict[str, str | None] = {
    "sparsify": None,
    "quantize": "sparsify",
    MERGED: "quantize",
    "publish": "sparsify",
    "convert": None,
    "recast": None,
    "tune": None,
    **{f"export {name}": MERGED for name in EXPORTS},
}
OF_CAMPAIGN = {
    "publish": ["publish"],
    "sources": ["convert", "recast"],
    "tuning": ["tune"],
    "exports": [f"export {name}" for name in EXPORTS],
}
MAGNITUDE: dict[str, object] = {"sparsify": {"method": "magnitude", "sparsity": 0.7}}
KEPT = (".safetensors", ".gguf", ".xml", ".bin")


@dataclass(frozen=True)
class Level:
    """What a recipe does without a fault: what it ends in, with which weights, how long it takes."""

    after: Path
    weights: dict[str, str]
    operations: int
    seconds: float


@dataclass
class Bench:
    """Where tries are made, and the levels that ran there without a fault."""

    root: Path
    model: Path
    levels: dict[str, Level] = field(default_factory=dict)

    @property
    def workspace(self) -> Path:
        """Where every try runs: in the same place, as paths enter identities."""
        return self.root / "runs"

    def recipe(self, level: str) -> Path:
        """The recipe file of a level; of "publish", one that was edited after the first level ran."""
        model: Path | dict[str, str] = self.model
        changes: dict[str, object] = {}
        if level == "publish":
            level, changes = "sparsify", {"sparsify": {"method": "wanda", "sparsity": 0.6}}
        elif level == "convert":
            level, model, changes = "sparsify", self.gguf(), MAGNITUDE
        elif level == "recast":
            level, changes = "sparsify", MAGNITUDE
            model = {"source": str(self.model), "storage_dtype": "float16"}
        elif level == "tune":
            tune = {"rank": 4, "max_steps": 5, "batch_size": 4, "checkpoint_steps": 2}
            level, changes = "sparsify", {"tune": tune}
        elif level not in LEVELS:
            level, changes = MERGED, {"export": {"formats": [level.removeprefix("export ")]}}
        return write_recipe(self.root / "tiny.yaml", model, self.workspace, level, **changes)

    def gguf(self) -> Path:
        """A GGUF file, made once."""
        path = self.root / "tiny.gguf"
        if not path.exists():
            (made,) = self.level("export gguf").after.glob("stages/export-gguf-*/*.gguf")
            shutil.copyfile(made, path)
        return path

    def reset(self, level: str) -> None:
        """The workspace as it was before a level."""
        before = BEFORE[level]
        after = self.level(before).after if before is not None else None
        shutil.rmtree(self.workspace, ignore_errors=True)
        if after is None:
            self.workspace.mkdir()
        else:
            shutil.copytree(after, self.workspace)

    def level(self, name: str) -> Level:
        """What a level does without a fault, found out once."""
        if name not in self.levels:
            if name == "convert":
                self.gguf()  # runs other levels, in the same place
            self.reset(name)
            recipe = self.recipe(name)
            counted, after = self.root / "operations", self.root / f"after {name}"
            started = time.perf_counter()

            def count() -> int:
                seen = watch(self.workspace, None, 0)
                code = run_command_line(["run", str(recipe)])
                counted.write_text(str(len(seen)))
                return code

            ended = run_child(count)
            assert ended.code == 0, ended.said
            seconds = time.perf_counter() - started
            shutil.copytree(self.workspace, after)
            self.levels[name] = Level(after, weights(after), int(counted.read_text()), seconds)
        return self.levels[name]


def prepare(root: Path) -> Bench:
    """Import everything, and run what needs no gradients, which a process that forks must not have taken.

    Reports have no plots: they are drawn in memory, touch no file, and would take half the time of all tries.
    """
    import_everything()
    page.draw_plots = lambda data: []  # type: ignore[attr-defined]
    model = write_model(root / "model")
    folder = root / "warm"
    folder.mkdir()
    recipe = write_recipe(folder / "tiny.yaml", model, folder / "runs", "quantize")
    with redirect_stdout(StringIO()):
        assert run_command_line(["run", str(recipe)]) == 0
    whole = write_recipe(folder / "tiny.yaml", model, folder / "runs", MERGED, export={"formats": [*EXPORTS]})
    stage_keys(load_recipe(whole), "")  # reads the source of every stage
    return Bench(root, model)


def weights(workspace: Path) -> dict[str, str]:
    """The digests of everything in stages and results that holds weights, or a graph."""
    digests = digest_files(workspace) if workspace.exists() else {}
    return {name: digest for name, digest in digests.items() if name.endswith(KEPT)}


def one_try(bench: Bench, campaign: str, seed: str) -> tuple[bool, str]:
    """(good, what happened) of one fault."""
    draw = random.Random(seed)
    levels = OF_CAMPAIGN.get(campaign, list(LEVELS))
    name = levels[0] if len(levels) == 1 else draw.choice(levels)
    fault = campaign if campaign in FAULTS else "kill" if campaign == "publish" else draw.choice(FAULTS)
    level = bench.level(name)
    recipe, shadow = bench.recipe(name), None
    bench.reset(name)
    operation = draw.randrange(1, level.operations + 1)
    by_time = fault == "kill" and campaign != "publish" and draw.random() < 0.3
    if fault == "power":
        shadow = Shadow(bench.workspace, bench.root / "shadow")

    def faulty() -> int:
        if shadow is not None:
            shadow.follow()
        if not by_time:
            full = fault == "disk"
            watch(bench.workspace, fail if full else kill, operation, onwards=full)
        return run_command_line(["run", str(recipe)])

    try:
        limit = draw.uniform(0, level.seconds) if by_time else None
        ended = run_child(faulty, seconds=120 if limit is None else limit)
        what = f"{name}, {fault} " + (
            f"after {limit:.2f} s" if limit is not None else f"operation {operation}"
        )
        if fault == "disk" and not ended.is_clean:
            return False, f"{what}: full disk: exit {ended.code}: {ended.said[-300:]}"
        if shadow is not None:
            shadow.power_cut(draw)
    finally:
        shutil.rmtree(bench.root / "shadow", ignore_errors=True)
    if campaign == "publish":
        places = (bench.workspace, level.after, bench.level("sparsify").after)
        models = [digest_files(place / "tiny" / "model") for place in places]
        if models[0] not in models[1:]:
            return False, f"{what}: neither the old nor the new model stands there"
    if fault == "torn":
        folders = [*bench.workspace.rglob("*.partial"), *bench.workspace.glob("models")]
        partial = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
        if partial:
            path = draw.choice(sorted(partial))
            what += f", {damage(path, draw)} {path.name}"
    ended = run_child(lambda: run_command_line(["run", str(recipe)]))
    if ended.code == 2 and ended.is_clean and fault in ("torn", "power"):
        return True, f"{what}: {ended.said.strip()}"
    if ended.code != 0:
        return False, f"{what}: then exit {ended.code}: {ended.said[-300:]}"
    found = weights(bench.workspace)
    lost = {name for name, digest in level.weights.items() if found.get(name) != digest}
    return not lost, f"{what}: " + (f"other bits in {sorted(lost)}" if lost else "same bits")


def main() -> None:
    """Run the campaigns and tell how many tries ended well."""
    parser = campaign_parser(__doc__, list(AIMS), "of each campaign (default: as many as the aim)")
    options = parse_options(parser)
    with tempfile.TemporaryDirectory() as folder:
        if options.one:
            print(one_try(prepare(Path(folder)), options.one.split(":")[1], options.one))
            return
        wanted = {name: options.tries or AIMS[name] for name in options.only or AIMS}
        campaign = Campaign.open(options.json, options.seed, wanted)
        bench = prepare(Path(folder))
        for name, key in campaign.turns(options.seconds):
            good, what = one_try(bench, name, key)
            campaign.note(name, key, good, what.split(",")[0], what)
    campaign.tell()


if __name__ == "__main__":
    main()
