"""The public interface as it is used, for the type checker alone: nothing runs this file."""

from pathlib import Path

import numpy as np
import torch

from sipl_min import SIPL
from sipl_min.data import Pairs
from sipl_min.fast import accelerate
from sipl_min.photos import read, write
from sipl_min.train import fit

model: SIPL = SIPL("nano", fusion=True)
loaded: SIPL = SIPL.from_pretrained("nano", device="cpu")
again: SIPL = SIPL.load(Path("weights.safetensors"))
theirs: SIPL = SIPL.from_published("promptir.ckpt")
fused: SIPL = SIPL.from_backbone("restormer.pth", identity_start=True)
fast: SIPL = accelerate(model)
x = torch.rand(1, 3, 8, 8)
features: list[torch.Tensor] = model.privileged(x)
guided: torch.Tensor = model.forward(x, features)
refined: torch.Tensor = model.refine(x, steps=2)
all_of_them: torch.Tensor = model.refine(x, 2, "chain", return_all=True)
photo: np.ndarray = read("photo.png")
write(Path("out.png"), model.restore(photo, steps=1, tile=512))
restored_array: np.ndarray = model.restore(photo)
restored_tensor: torch.Tensor = model.restore(x, 1)
restored_file: np.ndarray = model.restore(Path("photo.png"), overlap=32)
model.save("weights.safetensors")
log: list[dict[str, float]] = fit(model, "photos", suite="cdd11", recipe="authors", num_steps=10, folder=Path("run"))
fit(model, Pairs("in", "out", crop_size=64), recipe=lambda model, x, y: model(x), autocast=False)

# Mistakes, which the checker must find: an ignored error that is none is an error itself.
SIPL(3)  # type: ignore[arg-type]
model.refine(photo)  # type: ignore[arg-type]
model.refine(x, steps="two")  # type: ignore[arg-type]
model.refine(x, tolerance=0.1)  # type: ignore[call-arg]
wrong: np.ndarray = model.restore(x)  # type: ignore[arg-type]
model.save(photo)  # type: ignore[arg-type]
fit(photo)  # type: ignore[arg-type]
number: int = read("photo.png")  # type: ignore[assignment]
