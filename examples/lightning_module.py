"""The IE-CL objective in a Lightning module of one's own, without solo-learn's methods.

python examples/lightning_module.py
"""

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from iecl_solo.objectives.iecl import IECL, IECLConfig
from iecl_solo.objectives.protocol import Made, Space, Views, total


class Siamese(pl.LightningModule):
    """SimCLR's loss on two noisy views, with IE-CL's terms; view 1 is the query."""

    def __init__(self, dim: int = 64) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Conv2d(3, 32, 3, 2), nn.ReLU(), nn.Flatten())
        self.projector = nn.Sequential(nn.LazyLinear(128), nn.ReLU(), nn.Linear(128, dim))
        views = Views(num_views=2, momentum=False, query=(1,))
        self.objective = IECL(IECLConfig(), 32, views, self.network, Space(dim))

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        crops = [batch[0] + 0.1 * torch.randn_like(batch[0]) for _ in range(2)]
        crops = [self.objective.transform(x, view, "online") for view, x in enumerate(crops)]
        z = [self.projector(self.network(x)) for x in crops]
        z1, z2 = (F.normalize(each, dim=1) for each in z)
        loss = F.cross_entropy(z2 @ z1.T / 0.2, torch.arange(len(z1), device=self.device))
        terms = self.objective.terms(Made(dict(enumerate(z))), epoch=self.current_epoch)
        terms |= self.objective.weight_terms(self.network)
        self.log_dict({name: term.value.detach() for name, term in terms.items() if term.logged})
        added = total(terms)
        return loss if added is None else loss + added

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def main(epochs: int = 2) -> dict[str, float]:
    pl.seed_everything(0, verbose=False)
    digits = torch.from_numpy(load_digits().images).float()[:, None] / 8 - 1
    images = F.interpolate(digits, size=32).repeat(1, 3, 1, 1)
    loader = DataLoader(TensorDataset(images), batch_size=128, shuffle=True, drop_last=True)
    model = Siamese()
    model.projector(model.network(images[:2]))  # the lazy layer takes its width
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(max_epochs=epochs, accelerator="cpu", log_every_n_steps=5, **options)
    trainer.fit(model, loader)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


if __name__ == "__main__":
    print(main())
