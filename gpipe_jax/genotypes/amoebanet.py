"""List the published AmoebaNets (Real et al. 2019, https://arxiv.org/abs/1802.01548).

They are as in models/official/amoeba_net/model_specs.py of https://github.com/tensorflow/tpu at
7dc921f. Six of the eight concat sets differ from the unused states: that code lists them
explicitly, and only with its lists do the networks have their published sizes. (AmoebaNet-A with
N=6 and F=190 has 86.7M parameters; with the unused states it would have 75.1M.)
"""

from gpipe_jax.genotypes.genotype import Cell, Genotype

AMOEBANET_A = Genotype(
    normal=Cell(
        pairs=(
            (("avg_pool_3x3", 0), ("max_pool_3x3", 0)),
            (("sep_3x3", 1), ("identity", 1)),
            (("identity", 0), ("avg_pool_3x3", 1)),
            (("sep_3x3", 0), ("sep_5x5", 2)),
            (("avg_pool_3x3", 5), ("sep_3x3", 0)),
        ),
        concat=(1, 3, 4, 6),
    ),
    reduction=Cell(
        pairs=(
            (("sep_3x3", 1), ("avg_pool_3x3", 0)),
            (("max_pool_3x3", 0), ("sep_7x7", 2)),
            (("max_pool_3x3", 1), ("max_pool_3x3", 0)),
            (("sep_3x3", 4), ("conv_1x7_7x1", 0)),
            (("avg_pool_3x3", 1), ("sep_7x7", 0)),
        ),
        concat=(2, 3, 4, 5, 6),
    ),
    name="AmoebaNet-A",
)

AMOEBANET_B = Genotype(
    normal=Cell(
        pairs=(
            (("conv_1x1", 1), ("max_pool_3x3", 1)),
            (("identity", 1), ("sep_3x3", 0)),
            (("conv_1x1", 1), ("sep_3x3", 0)),
            (("conv_1x1", 2), ("identity", 2)),
            (("avg_pool_3x3", 1), ("conv_1x1", 5)),
        ),
        concat=(0, 3, 4, 6),
    ),
    reduction=Cell(
        pairs=(
            (("max_pool_2x2", 0), ("max_pool_3x3", 0)),
            (("identity", 2), ("conv_3x3", 1)),
            (("dil_2_sep_5x5", 2), ("max_pool_3x3", 2)),
            (("identity", 3), ("sep_3x3", 1)),
            (("avg_pool_3x3", 4), ("conv_1x1", 3)),
        ),
        concat=(5, 6),
    ),
    name="AmoebaNet-B",
)

AMOEBANET_C = Genotype(
    normal=Cell(
        pairs=(
            (("avg_pool_3x3", 0), ("sep_3x3", 0)),
            (("identity", 0), ("sep_3x3", 0)),
            (("avg_pool_3x3", 2), ("sep_3x3", 1)),
            (("identity", 0), ("sep_3x3", 1)),
            (("avg_pool_3x3", 3), ("sep_3x3", 0)),
        ),
        concat=(1, 2, 4, 5, 6),
    ),
    reduction=Cell(
        pairs=(
            (("max_pool_3x3", 0), ("max_pool_3x3", 0)),
            (("sep_7x7", 2), ("sep_3x3", 0)),
            (("sep_7x7", 0), ("max_pool_3x3", 1)),
            (("sep_5x5", 4), ("sep_5x5", 4)),
            (("max_pool_3x3", 1), ("sep_3x3", 1)),
        ),
        concat=(0, 2, 3, 4, 5, 6),
    ),
    name="AmoebaNet-C",
)

AMOEBANET_D = Genotype(
    normal=Cell(
        pairs=(
            (("conv_1x1", 1), ("max_pool_3x3", 1)),
            (("identity", 1), ("conv_1x7_7x1", 0)),
            (("conv_1x1", 0), ("conv_1x7_7x1", 0)),
            (("max_pool_3x3", 2), ("identity", 2)),
            (("avg_pool_3x3", 1), ("conv_1x1", 5)),
        ),
        concat=(0, 3, 4, 6),
    ),
    reduction=Cell(
        pairs=(
            (("max_pool_2x2", 0), ("max_pool_3x3", 0)),
            (("identity", 2), ("conv_3x3", 1)),
            (("conv_1x7_7x1", 2), ("max_pool_3x3", 2)),
            (("identity", 3), ("max_pool_2x2", 1)),
            (("avg_pool_3x3", 2), ("conv_1x1", 3)),
        ),
        concat=(4, 5, 6),
    ),
    name="AmoebaNet-D",
)

GENOTYPES = {"A": AMOEBANET_A, "B": AMOEBANET_B, "C": AMOEBANET_C, "D": AMOEBANET_D}
"""The published AmoebaNets by letter."""
