"""From the flags of a training script to data, checks, watchers and the loop."""

import json
import logging
import os

import numpy as np
import pytest
import torch
from test_runs import make_flags as make_flags_of_a_model
from toy import make_model

from improved_diffusion import checkpoint, logger, training_runs
from improved_diffusion.errors import UserError
from improved_diffusion.flags import make_parser
from improved_diffusion.image_datasets import ImageList, ImageStream
from improved_diffusion.runs import RunOptions
from improved_diffusion.script_util import ModelAndDiffusionOptions
