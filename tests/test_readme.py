"""What the README tells users to type is run."""

import json
import re
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from ser_reg import SERError, recorded

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


class Crops(Dataset):
    """Two crops of each image."""

    def __init__(self, transform, images):
        self.transform, self.images = transform, images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.transform(self.images[i]), self.transform(self.images[i])


KEYPOINTS = hasattr(tv_tensors, "KeyPoints")  # since torchvision 0.23


def stand_ins():
    """What the blocks take as given: the user's loader, loss and optimiser."""
    torch.manual_seed(0)
    x = torch.rand(2, 3, 224, 224)
    transform = v2.Compose([v2.RandomResizedCrop(64, scale=(0.5, 1)), v2.RandomHorizontalFlip()])
    return {
        "make_optimizer": lambda parameters: torch.optim.SGD(parameters, lr=1e-3),
        "my_transform": transform,
        "my_ssl_loss_on": lambda z1, z2: (z1 - z2).square().mean(),
        "crop_loader": DataLoader(Crops(recorded(transform), list(x)), batch_size=2) if KEYPOINTS else None,
        "batch_size": 2,
        "my_ssl_loss": lambda vit, x1, x2: (vit(x1) - vit(x2)).square().mean(),
        "loader": [(x, x[:, :, :96, :96], x[:, :, 96:192, :96])],
        "images": x,
        "x1": x,
        "x2": x.flip(-1),
    }


def test_first_code_comes_early():
    assert README.splitlines().index("```python") < 15


def test_blocks_run():
    """In order, as one reads them."""
    names = stand_ins()
    for number, block in enumerate(BLOCKS):
        old = "recorded(" in block and not KEYPOINTS
        with pytest.raises(SERError, match="torchvision") if old else nullcontext():
            exec(compile(block, f"README.md, block {number}", "exec"), names)
    assert names["out"].loss.isfinite()
    assert set(names["scores"]) == {"rotation", "flip", "scale"}


def test_loop_trains_the_early_blocks():
    names = stand_ins()
    block = BLOCKS[0].replace("    optimizer.step()\n    optimizer.zero_grad()\n", "")
    exec(compile(block, "README.md", "exec"), names)
    assert all(p.grad is not None for p in names["ser"].parameters())
    assert names["vit"].blocks[2].mlp.fc1.weight.grad.abs().max() > 0


def test_files_are_there():
    """Every file that a document links to, and every script that it tells to run."""
    for document in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("*/README.md")):
        text = document.read_text()
        for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
            assert (document.parent / link).exists(), f"{document}: {link}"
        for script in re.findall(r"(?:examples|benchmarks|docs|tests)/[\w/]+\.py", text):
            assert (ROOT / script).exists() or "NAME" in script, f"{document}: {script}"


def test_table_is_the_generated_one(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from quickstart_table import RESULTS, caption, load, table

    runs = load(sorted(RESULTS.glob("seed[0-9].json")))
    assert table(runs) in README
    assert caption(runs) in README


def test_benchmark_tables_are_the_generated_ones(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from table import FOLDERS, tables

    text = (ROOT / "benchmarks" / "README.md").read_text()
    assert FOLDERS
    assert all(tables(folder) in text for folder in FOLDERS)


def test_ablation_tables_are_the_generated_ones(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    from ablation.table import markdown
    from ablation.variants import ABLATIONS

    text = (ROOT / "examples" / "README.md").read_text()
    for name, ablation in ABLATIONS.items():
        results = json.loads((ROOT / "examples" / "results" / ablation.results).read_text())
        assert markdown(ablation, results) in text, name
        assert f"(results/{name}.png)" in text
        for variant in ablation.variants:
            assert len(results[variant.run]) >= 3, f"{variant.label}: fewer than three seeds"


def test_commands_are_there():
    """One line installs and runs the main job, one installs and tests."""
    lines = [line for line in README.splitlines() if line.startswith("pip install ")]
    assert sum("examples/quickstart.py" in line for line in lines) == 1
    assert sum(line.endswith("pytest") for line in lines) == 1


def test_picture_of_the_rooms_has_them_all(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT / "docs")
    from architecture import LIBRARY, PACKAGE, draw

    rooms = {path.name + "/" * path.is_dir() for path in PACKAGE.iterdir() if path.suffix in ("", ".py")}
    assert set(LIBRARY) == rooms - {"__init__.py", "__pycache__/"}
    draw(tmp_path / "architecture.png")
    assert (tmp_path / "architecture.png").stat().st_size > 100_000
