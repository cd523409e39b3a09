"""Build networks as lists of layers, with one file or folder for each family."""

from gpipe_jax.genotypes.amoebanet import AMOEBANET_A, AMOEBANET_B, AMOEBANET_C, AMOEBANET_D
from gpipe_jax.genotypes.genotype import Genotype
from gpipe_jax.zoo.amoebanet.network import amoebanet
from gpipe_jax.zoo.basic import convnet, mlp
from gpipe_jax.zoo.resnet import resnet
from gpipe_jax.zoo.transformer.networks import encoder_decoder, transformer_lm
from gpipe_jax.zoo.unet import unet

MODELS = {
    "convnet": convnet,
    "resnet": resnet,
    "amoebanet": amoebanet,
    "unet": unet,
    "transformer_lm": transformer_lm,
    "encoder_decoder": encoder_decoder,
    "mlp": mlp,
}

__all__ = [
    "AMOEBANET_A",
    "AMOEBANET_B",
    "AMOEBANET_C",
    "AMOEBANET_D",
    "MODELS",
    "Genotype",
    "amoebanet",
    "convnet",
    "encoder_decoder",
    "mlp",
    "resnet",
    "transformer_lm",
    "unet",
]
