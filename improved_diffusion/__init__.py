"""Training and sampling of diffusion models on images: DDPM, DDIM, IDDPM.

Importing this package needs torch and NumPy only.
"""

from ._version import __version__
from .denoiser import Denoiser
from .errors import UserError
from .gaussian_diffusion import (
    GaussianDiffusion,
    LossType,
    ModelMeanType,
    ModelVarType,
    betas_for_alpha_bar,
    get_named_beta_schedule,
)
from .respace import SpacedDiffusion, space_timesteps
from .script_util import (
    classifier_and_diffusion_defaults,
    classifier_defaults,
    create_classifier,
    create_classifier_and_diffusion,
    create_gaussian_diffusion,
    create_model,
    create_model_and_diffusion,
    model_and_diffusion_defaults,
    sr_create_model,
    sr_create_model_and_diffusion,
    sr_model_and_diffusion_defaults,
)
from .solvers import SOLVERS
from .unet import EncoderUNetModel, SuperResModel, UNetModel

__all__ = [
    "SOLVERS",
    "Denoiser",
    "EncoderUNetModel",
    "GaussianDiffusion",
    "LossType",
    "ModelMeanType",
    "ModelVarType",
    "SpacedDiffusion",
    "SuperResModel",
    "UNetModel",
    "UserError",
    "__version__",
    "betas_for_alpha_bar",
    "classifier_and_diffusion_defaults",
    "classifier_defaults",
    "create_classifier",
    "create_classifier_and_diffusion",
    "create_gaussian_diffusion",
    "create_model",
    "create_model_and_diffusion",
    "get_named_beta_schedule",
    "model_and_diffusion_defaults",
    "space_timesteps",
    "sr_create_model",
    "sr_create_model_and_diffusion",
    "sr_model_and_diffusion_defaults",
]
