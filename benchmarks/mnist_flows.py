"""Flow guides on MNIST: planar flows of 0, 10, 20 and 40 transforms, with IAF, spline and Sylvester beside them.

python benchmarks/mnist_flows.py           # each row with three seeds; goes on where it was interrupted
python benchmarks/mnist_flows.py --times   # milliseconds for a step, on a quiet machine

"""

from __future__ import annotations

import mnist_table
from mnist_table import BASE, pair

from pyro_vae.guides import families

ROWS = {
    "planar 0": BASE,
    **{f"planar {K}": pair(families.Planar(K)) for K in (10, 20, 40)},
    "IAF 2": pair(families.IAF(transforms=2)),
    "spline 2": pair(families.AutoregressiveSpline(transforms=2)),
    "Sylvester 4": pair(families.OrthogonalSylvester(transforms=4, columns=8)),
}

ALSO_TIMED = {
    "MultivariateNormal": pair(families.MultivariateNormal()),
    "LowRankMultivariateNormal": pair(families.LowRankMultivariateNormal(rank=4)),
    "Radial 10": pair(families.Radial(10)),
    "Householder 4": pair(families.HouseholderSylvester(transforms=4, reflections=8)),
    "Triangular 4": pair(families.TriangularSylvester(transforms=4)),
    "MAF 2": pair(families.MAF(transforms=2)),
    "RealNVP 2": pair(families.RealNVP(transforms=2)),
    "CouplingSpline 2": pair(families.CouplingSpline(transforms=2)),
}

if __name__ == "__main__":
    mnist_table.main("mnist_flows", ROWS, ALSO_TIMED, (__doc__ or "") + (mnist_table.__doc__ or ""))
