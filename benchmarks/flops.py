"""FLOPs that SER adds to a MoCo-v3 step of ViT-S/16 at 224 pixels, forward and backward.

256 images a rank, 8 ranks, r = 0.01: three images a rank are seen by SER, their keys come from all ranks. The step
has the same late [CLS] with and without SER. The paper's Table 17 says 1.008.

Run: python benchmarks/flops.py
"""

import copy
import tempfile
from typing import Any

import record
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from ser_reg import EquivariantViews, SERLoss, late_cls, partition_size, patch_tokens
from ser_reg.backbones import backbone

BATCH, RANKS, RATIO, LAYER = 256, 8, 0.01, 3
IMAGES = partition_size(BATCH, RATIO, RANKS)


def loss_flops(
    z1: torch.Size, z2: torch.Size, others: torch.Size | None, offsets: torch.Size, *_: Any, **__: Any
) -> int:
    """What the streaming loss computes, as the counter does not look inside operators of our own.

    Every logit, be its key of this rank or of another, is computed twice (sums, then weights) and used for two
    products. The counter gives shapes only: images are taken to have one number of tokens.
    """
    (total, width), images = z1, offsets[0] - 1
    near = images * (images - 1) // 2 * (2 * total // images) ** 2
    far = 2 * total * (0 if others is None else others[0])
    return 2 * width * 4 * (near + far)


def accuracy_flops(z1: torch.Size, z2: torch.Size, others: torch.Size | None, *_: Any, **__: Any) -> int:
    """Evenly spaced anchors against every key."""
    total, width = z1
    return 2 * width * min(total, 256) * (2 * total + (0 if others is None else others[0]))


def counter() -> FlopCounterMode:
    operators = torch.ops.ser_reg
    return FlopCounterMode(
        display=False, custom_mapping={operators.patch_ntxent: loss_flops, operators.accuracy: accuracy_flops}
    )


def mlp(*widths: int) -> nn.Sequential:
    """A MoCo-v3 head."""
    layers: list[nn.Module] = []
    for i, (ins, outs) in enumerate(zip(widths, widths[1:], strict=False)):
        last = i == len(widths) - 2
        layers += [nn.Linear(ins, outs, bias=False), nn.BatchNorm1d(outs, affine=not last)]
        layers += [] if last else [nn.ReLU()]
    return nn.Sequential(*layers)


def base_flops() -> int:
    """One step of MoCo-v3 on one rank: two views, their momentum keys of all ranks."""
    with torch.device("meta"):
        encoder = late_cls(timm.create_model("vit_small_patch16_224", num_classes=0, dynamic_img_size=True), LAYER)
        backbone(encoder).projection.requires_grad_(False)
        online, predictor = nn.Sequential(encoder, mlp(384, 4096, 4096, 256)), mlp(256, 4096, 256)
        momentum = copy.deepcopy(online)
        views = [torch.empty(BATCH, 3, 224, 224) for _ in range(2)]
        with counter() as count:
            queries = [F.normalize(predictor(online(x)), dim=-1) for x in views]
            with torch.no_grad():
                keys = [F.normalize(momentum(x), dim=-1).repeat(RANKS, 1) for x in views]
            logits = [queries[0] @ keys[1].T, queries[1] @ keys[0].T]
            sum(F.cross_entropy(x, torch.zeros(BATCH, dtype=torch.long)) for x in logits).backward()
    return int(count.get_total_flops())


def ser_flops(rank: int, store: str, found: Any) -> None:
    """The term on one of the ranks, its tokens taken from the normal forward."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    torch.manual_seed(0)  # the same projector on every rank, as DDP has it
    ser = SERLoss(384)
    torch.manual_seed(rank)
    views = EquivariantViews(16, scale=(1, 1), ratio=(1, 1))(torch.rand(IMAGES, 3, 224, 224))
    z = list(torch.randn(2, IMAGES, 384, 14, 14, requires_grad=True))
    with counter() as count:
        ser(z, views).loss.backward()
    found[rank] = count.get_total_flops()
    dist.destroy_process_group()


def forward_flops() -> int:
    """The two extra forwards through the early blocks, where a loop calls patch_tokens beside its SSL forward."""
    with torch.device("meta"):
        encoder = late_cls(timm.create_model("vit_small_patch16_224", num_classes=0, dynamic_img_size=True), LAYER)
        with counter() as count:
            maps: list[Tensor] = [patch_tokens(encoder, torch.empty(IMAGES, 3, 224, 224), LAYER) for _ in range(2)]
            sum(z.sum() for z in maps).backward()
    return int(count.get_total_flops())


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder, mp.Manager() as manager:
        found = manager.dict()
        mp.spawn(ser_flops, (f"{folder}/store", found), nprocs=RANKS)
        term = max(found.values())
    base, forwards = base_flops(), forward_flops()
    row = {
        "images": IMAGES,
        "base": base,
        "ser": term,
        "forwards": forwards,
        "relative": 1 + term / base,
        "relative_with_own_forwards": 1 + (term + forwards) / base,
    }
    print(f"MoCo-v3 step of {BATCH} images: {base / 1e12:.2f} TFLOP; SER on {IMAGES} of them: {term / 1e9:.1f} GFLOP")
    print(f"relative {row['relative']:.5f}")
    print(f"with patch_tokens beside the SSL forward {row['relative_with_own_forwards']:.5f}")
    print(record.save("flops", [row]))
