"""The rows of `codes.py`: two bits of slope for each activation and scheme. `scripts/fit_codes.py` finds them.

relu3 of gelu and silu is as published: ReGELU2 and ReSiLU2 of LowMemoryBP (arXiv 2406.16282), found there by simulated
annealing: their integral of (f - h~)^2 is 0.025% and 0.006% above the least. At the least, where c2 = 0 and c1 = -c3,
the levels are within 1e-3 of the published and the thresholds within 0.02; the integral is so flat that 0.1% of it
allows 0.07 in an outer one. Every other row is at the least of its objective, which `fit_codes.py` states.

The integral is over the interval below, published for gelu and silu; beyond the others f is within 1e-8 of its
asymptotes. The root mean square and the bias are of slope - f'(x), x ~ N(0, 1); unbiased and lloyd have no bias there.

                   interval     integral   rms relu3    bias  unbiased    lloyd
    gelu         -6.07   6.07    0.0095093   0.2408  +0.0003   0.1542   0.0894
    gelu_tanh    -5.43   5.43    0.0095522   0.2413  +0.0000   0.1543   0.0895
    silu        -38.23  38.23    0.0399438   0.2902  +0.0002   0.1604   0.0889
    mish        -21.49  10.74    0.0192637   0.2582  +0.0085   0.1520   0.0876
    softplus    -18.42  18.42    0.0144985   0.1426  +0.0000   0.1350   0.0598
    elu         -18.42   0.00    0.0014665   0.1035  +0.0006   0.0968   0.0535
    selu        -18.98   0.00    0.0092379   0.2118  -0.0003   0.1746   0.0839
    hardswish    -3.00   3.00    0.1166667   0.3668  +0.0000   0.2474   0.1099
    tanh         -9.56   9.56    0.0122332   0.1931  +0.0088   0.1295   0.0705
    sigmoid     -18.42  18.42    0.0061166   0.0414  -0.0103   0.0252   0.0123
"""

from __future__ import annotations

from graphopt.lowering.codes import Code


def _relu3(a: tuple[float, float, float], c: tuple[float, float, float]) -> Code:
    """The slopes of sum a_i max(x - c_i, 0), where the a sum to one."""
    return Code((0.0, a[0], 1.0 - a[2], 1.0), c)


REGELU2 = _relu3(
    a=(-0.04922261145617846, 1.0979632065417297, -0.048740595085551286),
    c=(-3.1858810036855245, -0.001178821281161997, 3.190832613414926),
)
RESILU2 = _relu3(
    a=(-0.04060357190528599, 1.080925428529668, -0.040321856624382146),
    c=(-6.3050461001646445, -0.0008684942046214787, 6.325815242089708),
)

CODES: dict[str, dict[str, Code]] = {
    "gelu": {
        "relu3": REGELU2,
        "unbiased": Code((-0.12890415, 0.2754169, 0.7245831, 1.1289042)),
        "lloyd": Code((-0.0463855, 0.3126759, 0.6873241, 1.0463855), (0.1331452, 0.5, 0.8668548)),
    },
    "gelu_tanh": {
        "relu3": Code((0.0, -0.049786133, 1.049786133, 1.0), (-3.16288007, 0.0, 3.16288007)),
        "unbiased": Code((-0.12899308, 0.2753581, 0.7246419, 1.1289932)),
        "lloyd": Code((-0.04638, 0.3126294, 0.6873706, 1.04638), (0.1331247, 0.5, 0.8668753)),
    },
    "silu": {
        "relu3": RESILU2,
        "unbiased": Code((-0.099839322, 0.2997253, 0.7002816, 1.09983933)),
        "lloyd": Code((0.0335934, 0.3445251, 0.6554749, 0.9664066), (0.18905925, 0.5, 0.81094075)),
    },
    "mish": {
        "relu3": Code((0.0, -0.056989101, 1.022219955, 1.0), (-5.66625874, -0.20982725, 4.34148133)),
        "unbiased": Code((-0.112526126, 0.2906351, 0.709251, 1.0884982)),
        "lloyd": Code((0.0116681, 0.3474248, 0.6886654, 1.0131429), (0.17954645, 0.5180451, 0.85090415)),
    },
    "softplus": {
        "relu3": Code((0.0, 0.236323378, 0.763676622, 1.0), (-2.5068174, 0.0, 2.5068174)),
        "unbiased": Code((0.0, 0.3542493, 0.6457507, 1.0)),
        "lloyd": Code((0.2135022, 0.4077961, 0.5922039, 0.7864978), (0.31064915, 0.5, 0.68935085)),
    },
    "elu": {
        "relu3": Code((0.0, 0.086848667, 0.416101788, 1.0), (-3.63177744, -1.48265164, -0.33638961)),
        "unbiased": Code((0.0, 0.3419853, 0.6557914, 1.0)),
        "lloyd": Code((0.2239172, 0.466337, 0.7184249, 0.9917933), (0.3451271, 0.59238095, 0.8551091)),
    },
    "selu": {
        "relu3": Code((0.0, 0.244582632, 1.168609388, 1.0507009873554805), (-3.16062467, -1.01149887, 0.42756428)),
        "unbiased": Code((0.0, 0.5545135, 1.0507009873554805, 1.7580994)),
        "lloyd": Code((0.3463454, 0.6991378, 1.0555076, 1.5098562), (0.5227416, 0.8773227, 1.2826819)),
    },
    "hardswish": {
        "relu3": Code((0.0, -0.074074074, 1.074074074, 1.0), (-4.5, 0.0, 4.5)),
        "unbiased": Code((-0.5, 0.2557525, 0.7442475, 1.5)),
        "lloyd": Code((0.0060105, 0.3513609, 0.6486391, 0.9939895), (0.1786857, 0.5, 0.8213143)),
    },
    "tanh": {
        "relu3": Code((0.0, 0.807659336, 0.188636408, 0.0), (-1.25350537, 0.95629112, 2.09730753)),
        "unbiased": Code((0.0, 0.3478086, 0.6976142, 1.0)),
        "lloyd": Code((0.1465535, 0.4178013, 0.687909, 0.935562), (0.2821774, 0.55285515, 0.8117355)),
    },
    "sigmoid": {
        "relu3": Code((0.0, 0.201914834, 0.047159102, 0.0), (-2.50701073, 1.91258224, 4.19461506)),
        "unbiased": Code((0.0, 0.1258739, 0.198959, 0.25)),
        "lloyd": Code((0.0957522, 0.1564891, 0.2036956, 0.2410878), (0.12612065, 0.18009235, 0.2223917)),
    },
}
