"""Dense prediction: a linear head on the frozen feature map, judged by its mIoU.

The head is a 1 x 1 convolution on features standardised by the training set's statistics; its
logits are upsampled to the mask. Nothing of the network is trained, as in the linear probes of
DINOv2 (Oquab et al. 2023, arXiv 2304.07193, section 7.4).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.datasets
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchmetrics.classification import MulticlassJaccardIndex
from torchvision import transforms

from iecl_solo.errors import IECLError, one_line
from iecl_solo.evaluate.probe import epoch_order
from iecl_solo.evaluate.protocol import DenseProtocol
from iecl_solo.images import image_files, load_image

#: The value of mask pixels that count nowhere, as in Pascal VOC.
IGNORED = 255


class Masked(Dataset):
    """Images with a mask each.

    Args:
        pairs: paths of image and mask.
        transform: from an RGB image to (3, S, S).
        size: S, to which the mask is brought by its nearest pixel.
        relabel: what a mask's values become; None leaves them.
    """

    def __init__(
        self,
        pairs: Sequence[tuple[Path, Path]],
        transform: Any,
        size: int,
        relabel: dict[int, int] | None = None,
    ) -> None:
        self.pairs, self.transform, self.size, self.relabel = pairs, transform, size, relabel

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        image, mask = self.pairs[i]
        with Image.open(mask) as opened:
            if opened.mode not in ("L", "P", "1"):
                raise IECLError(f"mask {mask}: mode {opened.mode}, one class a pixel is expected")
            small = opened.resize((self.size, self.size), Image.Resampling.NEAREST)
            values = np.asarray(small, dtype=np.int64).copy()
        if self.relabel is not None:
            table = np.full(256, IGNORED)
            for old, new in self.relabel.items():
                table[old] = new
            values = table[values]
        return self.transform(load_image(image)), torch.from_numpy(values)


def _folder_pairs(folder: Path) -> list[tuple[Path, Path]]:
    pairs = []
    for image in image_files(folder / "images"):
        below = image.relative_to(folder / "images")
        mask = (folder / "masks" / below).with_suffix(".png")
        if not mask.is_file():
            raise IECLError(f"dense: {image} has no mask {mask}")
        pairs.append((image, mask))
    return pairs


def masked_sets(protocol: DenseProtocol, transform: Any, size: int) -> tuple[Masked, Masked]:
    """Training and test part.

    Args:
        protocol: where they are.
        transform: from an RGB image to (3, size, size).
        size: of images and masks.

    Raises:
        IECLError: one line, for what is missing.
    """
    if protocol.root is None:
        raise IECLError("dense.root: no value is given, the folder of images and masks is needed")
    root = Path(protocol.root).expanduser()
    if protocol.torchvision is None:
        train, test = (_folder_pairs(root / part) for part in ("train", "val"))
        return Masked(train, transform, size), Masked(test, transform, size)
    voc = protocol.torchvision == "VOCSegmentation"
    sets = []
    for part in ("train", "val") if voc else ("trainval", "test"):
        try:
            if voc:
                found: Any = torchvision.datasets.VOCSegmentation(str(root), image_set=part)
                pairs = list(zip(map(Path, found.images), map(Path, found.masks), strict=True))
                sets.append(Masked(pairs, transform, size))
            else:
                found = torchvision.datasets.OxfordIIITPet(str(root), split=part)
                pairs = list(zip(map(Path, found._images), map(Path, found._segs), strict=True))
                # 1 the animal, 2 the background, 3 the border, which counts nowhere
                sets.append(Masked(pairs, transform, size, {1: 1, 2: 0}))
        except (RuntimeError, OSError) as error:
            said = f"dense: torchvision's {protocol.torchvision}: {one_line(error)}"
            raise IECLError(said) from None
    return sets[0], sets[1]


def square(transform: transforms.Compose, size: int) -> transforms.Compose:
    """A transform for evaluation that shows the whole image, as a square, so that masks fit."""
    steps = transform.transforms
    start = next(i for i, step in enumerate(steps) if isinstance(step, transforms.ToTensor))
    return transforms.Compose([transforms.Resize((size, size)), *steps[start:]])


@torch.inference_mode()
def feature_map(backbone: nn.Module, x: Tensor) -> Tensor:
    """A backbone's last map of features, before it is pooled.

    Args:
        backbone: (B, 3, H, W) to (B, d); a convolutional network or a transformer of timm's kind.
        x: (B, 3, H, W).

    Returns:
        (B, C, h, w); a transformer's patches on their grid, without its class token.

    Raises:
        IECLError: where there is no map of more than one place.
    """
    forward: Any = getattr(backbone, "forward_features", None)
    if forward is not None:
        out = forward(x)
        if out.dim() == 3:  # tokens
            skipped = getattr(backbone, "num_prefix_tokens", 1)
            out = out[:, skipped:]
            rows = int(out.shape[1] ** 0.5)
            if rows * rows != out.shape[1]:
                raise IECLError(f"dense: {out.shape[1]} patches are no square grid")
            out = out.transpose(1, 2).unflatten(2, (rows, rows))
        elif out.shape[-1] == getattr(backbone, "num_features", None) != out.shape[1]:
            out = out.permute(0, 3, 1, 2)  # channels last, as Swin has them
    else:
        maps: list[Tensor] = []

        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.dim() == 4 and output.shape[2:].numel() > 1:
                maps[:] = [output]

        handles = [module.register_forward_hook(keep) for module in backbone.modules()]
        try:
            backbone(x)
        finally:
            for handle in handles:
                handle.remove()
        out = maps[0] if maps else x.new_zeros(len(x), 1, 1, 1)
    if out.shape[2:].numel() < 2:
        raise IECLError(
            f"dense: the feature map of {x.shape[2]} x {x.shape[3]} pixels is one place; "
            "give a larger dense.size"
        )
    return out


def _maps(
    backbone: nn.Module, dataset: Dataset, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    backbone = backbone.to(device).eval()
    maps, masks = [], []
    for x, y in DataLoader(dataset, 32):
        # a copy: what was made in inference mode cannot be trained on
        maps.append(feature_map(backbone, x.to(device)).float().cpu().clone())
        masks.append(y)
    return torch.cat(maps), torch.cat(masks)


def dense_miou(
    backbone: nn.Module,
    train: Dataset,
    test: Dataset,
    protocol: DenseProtocol,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> float:
    """Mean over classes of intersection over union on the test masks, in per cent.

    Args:
        backbone: frozen; see ``feature_map``.
        train: images (3, S, S) and masks (S, S) that train the head.
        test: those that judge it.
        protocol: how it is trained.
        seed: of its initial weights and of the order of the images.
        device: where to compute.
        progress: told how many epochs are done, and of how many; first of 0, once there are maps.

    Raises:
        IECLError: where the masks hold fewer than two classes.
    """
    maps, masks = _maps(backbone, train, device)
    shown, truth = _maps(backbone, test, device)
    progress(0, protocol.max_epochs)  # the pace to tell is that of the epochs, not of the maps
    known = masks[masks != IGNORED]
    classes = int(known.max()) + 1 if len(known) else 0
    if classes < 2:
        raise IECLError(f"dense: the training masks hold {classes} classes, at least 2 are needed")
    mean, deviation = maps.mean((0, 2, 3), keepdim=True), maps.std((0, 2, 3), keepdim=True) + 1e-6
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = nn.Conv2d(maps.shape[1], classes, 1).to(device)

    def logits(x: Tensor, size: torch.Size) -> Tensor:
        x = ((x - mean) / deviation).to(device)
        return F.interpolate(head(x), size=tuple(size), mode="bilinear", align_corners=False)

    optimizer = torch.optim.Adam(head.parameters(), lr=protocol.lr)
    steps = protocol.max_epochs * -(-len(maps) // protocol.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for epoch in range(protocol.max_epochs):
        for rows in epoch_order(len(maps), seed, epoch).split(protocol.batch_size):
            wanted = masks[rows].to(device)
            if (wanted == IGNORED).all():
                continue
            loss = F.cross_entropy(
                logits(maps[rows], wanted.shape[1:]), wanted, ignore_index=IGNORED
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        progress(epoch + 1, protocol.max_epochs)
    # a class that only the test masks have is one that is never hit
    told = truth[truth != IGNORED]
    total = max(classes, int(told.max()) + 1 if len(told) else 0)
    metric = MulticlassJaccardIndex(total, average="macro", ignore_index=IGNORED)
    with torch.inference_mode():
        for x, y in zip(shown.split(32), truth.split(32), strict=True):
            metric.update(logits(x, y.shape[1:]).argmax(1).cpu(), y)
    return 100 * float(metric.compute())
