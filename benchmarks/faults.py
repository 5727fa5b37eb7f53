"""Runs that are killed, cut from power, or find damaged files or a full disk: do they end with the same bits?

    python -m benchmarks.faults [--tries N] [--seconds S] [--seed N] [--only NAME] --json FILE

Every try starts from finished stages, runs the next ones in a child forked from this warm process, lets a
fault happen, and runs again without one. Good is: the same bits as without a fault, or one line and exit 2.
Seeds of bad tries are told and kept in the JSON.

kill: SIGKILL before a drawn file operation, or after a drawn time. publish: the same, while the results of
an edited recipe replace older ones; what stands under the published name is the old or the new one, whole.
power: the kill, and unsynced writes are dropped or torn. torn: the kill, and a file of unfinished work is
damaged. disk: no write succeeds from a drawn operation on.
"""

import random
import shutil
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.campaign import Campaign, campaign_parser
from benchmarks.common import parse_options
from benchmarks.faulty_disk import Shadow, damage, fail, kill, watch
from benchmarks.tiny import LEVELS, write_model, write_recipe
from benchmarks.warm import import_everything, run_child

from sqft.artifacts import digest_files
from sqft.cli import run_command_line

AIMS = {"kill": 300, "publish": 53, "power": 100, "torn": 200, "disk": 50}
EDITED = {"sparsify": {"method": "wanda", "sparsity": 0.6}}


@dataclass
class Bench:
    """Where tries are made, and for each level the workspace before it and the weights after it."""

    root: Path
    model: Path
    before: dict[str, Path] = field(default_factory=dict)
    weights: dict[str, dict[str, str]] = field(default_factory=dict)
    operations: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def workspace(self) -> Path:
        """Where every try runs: in the same place, as paths enter identities."""
        return self.root / "runs"

    def recipe(self, level: str) -> Path:
        """The recipe file of a level; of "publish", one that was edited after the first level ran."""
        changes = EDITED if level == "publish" else {}
        name = "sparsify" if level == "publish" else level
        return write_recipe(self.root / "tiny.yaml", self.model, self.workspace, name, **changes)

    def reset(self, level: str) -> None:
        """The workspace as it was before a level."""
        shutil.rmtree(self.workspace, ignore_errors=True)
        shutil.copytree(self.before[level], self.workspace)


def prepare(root: Path) -> Bench:
    """Import everything once, and run everything once without a fault."""
    import_everything()
    bench = Bench(root, write_model(root / "model"))
    bench.workspace.mkdir()
    for level in [*LEVELS, "publish"]:
        if level == "publish":
            bench.reset("quantize")  # the first level, published
        bench.before[level] = root / f"before {level}"
        shutil.copytree(bench.workspace, bench.before[level])
        recipe = bench.recipe(level)
        counted = root / "operations"
        started = time.perf_counter()

        def count(recipe: Path = recipe, counted: Path = counted) -> int:
            seen = watch(bench.workspace, None, 0)
            code = run_command_line(["run", str(recipe)])
            counted.write_text(str(len(seen)))
            return code

        ended = run_child(count)
        assert ended.code == 0, ended.said
        bench.seconds[level] = time.perf_counter() - started
        bench.operations[level] = int(counted.read_text())
        bench.weights[level] = weights(bench.workspace)
    return bench


def weights(workspace: Path) -> dict[str, str]:
    """The digests of everything published that is no text, and of what stages hold in safetensors."""
    digests = digest_files(workspace) if workspace.exists() else {}
    return {name: digest for name, digest in digests.items() if name.endswith(".safetensors")}


def one_try(bench: Bench, campaign: str, seed: str) -> tuple[bool, str]:
    """(good, what happened) of one fault."""
    draw = random.Random(seed)
    level = "publish" if campaign == "publish" else draw.choice(list(LEVELS))
    bench.reset(level)
    recipe, shadow = bench.recipe(level), None
    old = digest_files(bench.workspace / "tiny")
    operation = draw.randrange(1, bench.operations[level] + 1)
    by_time = campaign == "kill" and draw.random() < 0.3
    if campaign == "power":
        shadow = Shadow(bench.workspace, bench.root / "shadow")

    def faulty() -> int:
        if shadow is not None:
            shadow.follow()
        if not by_time:
            full = campaign == "disk"
            watch(bench.workspace, fail if full else kill, operation, onwards=full)
        return run_command_line(["run", str(recipe)])

    try:
        limit = draw.uniform(0, bench.seconds[level]) if by_time else None
        ended = run_child(faulty, seconds=120 if limit is None else limit)
        what = f"{level}, " + (f"after {limit:.2f} s" if limit is not None else f"operation {operation}")
        if campaign == "disk" and not ended.is_clean:
            return False, f"{what}: full disk: exit {ended.code}: {ended.said[-300:]}"
        if shadow is not None:
            shadow.power_cut(draw)
    finally:
        shutil.rmtree(bench.root / "shadow", ignore_errors=True)
    if campaign == "publish" and digest_files(bench.workspace / "tiny/model") not in (
        _inside(old, "model"),
        _inside(published(bench), "model"),
    ):
        return False, f"{what}: neither the old nor the new model stands there"
    if campaign == "torn":
        partial = [p for d in bench.workspace.glob("stages/*.partial") for p in d.rglob("*") if p.is_file()]
        if partial:
            path = draw.choice(sorted(partial))
            what += f", {damage(path, draw)} {path.name}"
    ended = run_child(lambda: run_command_line(["run", str(recipe)]))
    if ended.code == 2 and ended.is_clean and campaign in ("torn", "power"):
        return True, f"{what}: {ended.said.strip()}"
    if ended.code != 0:
        return False, f"{what}: then exit {ended.code}: {ended.said[-300:]}"
    found = weights(bench.workspace)
    lost = {name for name, digest in bench.weights[level].items() if found.get(name) != digest}
    return not lost, f"{what}: " + (f"other bits in {sorted(lost)}" if lost else "same bits")


def published(bench: Bench) -> dict[str, str]:
    """What the edited recipe publishes, made once."""
    place = bench.root / "published"
    if not place.exists():
        bench.workspace.rename(bench.root / "aside")
        bench.reset("publish")
        run_child(lambda: run_command_line(["run", str(bench.recipe("publish"))]))
        shutil.copytree(bench.workspace / "tiny", place)
        shutil.rmtree(bench.workspace)
        (bench.root / "aside").rename(bench.workspace)
    return digest_files(place)


def _inside(digests: dict[str, str], folder: str) -> dict[str, str]:
    start = f"{folder}/"
    return {name.removeprefix(start): digest for name, digest in digests.items() if name.startswith(start)}


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
