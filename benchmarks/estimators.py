"""Signal-to-noise ratios of estimators on a trained VAE: `compare_estimators` on the "VAE 1" row of mnist_iwae.py.

Bounds, gaps to the bound of 1,000 draws, bias and noise of the gradients, time and memory of a step, for K = 1 to 64,
on a batch of 20 test images; the figure of signal against K with fitted slopes (arXiv 1802.04537, 1810.04152).

    python benchmarks/estimators.py
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path

from common import machine
from mnist_iwae import EPOCHS, train

from pyro_vae import compare_estimators, load_dataset
from pyro_vae.estimators import CIWAE, IWAE, STL, DReG, Renyi

HERE = Path(__file__).parent
ESTIMATORS = {
    "STL": STL,
    "IWAE": IWAE,
    "DReG": DReG,
    "Renyi 0.5": lambda K: Renyi(0.5, K),
    "CIWAE 0.5": lambda K: CIWAE(0.5, K),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--num_gradients", type=int, default=400)
    parser.add_argument("--root", default=None, help="folder of the data (default: PYRO_VAE_DATA)")
    parser.add_argument("--out", type=Path, default=Path("runs/mnist_iwae"))
    arguments = parser.parse_args()
    arguments.paper = False
    digits = load_dataset("mnist", binarize="dynamic", root=arguments.root)
    run = train("VAE 1", digits, 0, arguments)
    comparison = compare_estimators(
        run.model,
        run.guide,
        digits.test,
        ESTIMATORS,
        num_particles=(1, 2, 4, 8, 16, 32, 64),
        num_data=200,
        num_samples=1000,
        num_gradients=arguments.num_gradients,
        num_references=arguments.num_gradients,
        batch_size=20,
    )
    print(comparison)
    comparison.to_json(HERE / "estimators.json")
    content = json.loads((HERE / "estimators.json").read_text())
    (HERE / "estimators.json").write_text(json.dumps({"machine": machine(), **content}, indent=1) + "\n")
    with tempfile.TemporaryDirectory() as folder:
        comparison.figures(folder)
        shutil.copy(Path(folder) / "signal_to_noise.png", HERE / "estimators.png")


if __name__ == "__main__":
    main()
