"""What a training run moves: the model's weights, what the optimiser updates, and averages."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from . import dist_util
from .divergence import all_finite
from .fp16_util import make_master_params, unflatten_master_params
from .nn import update_ema
from .optimization import PRECISIONS, OptimizationOptions, make_optimizer
from .parallel import ParallelOptions, like, local, shard
from .posthoc_ema import gamma_of, power_rate


class TrainedWeights:
    """Equal weights on all processes, with their optimiser and averages.

    ``model_params`` are the model's. ``master_params`` are what the optimiser ``opt`` updates: the
    same, or with ``use_fp16`` one flat float32 copy. ``ema_params`` has a list like
    ``master_params`` for each of ``ema_rate``, ``posthoc_params`` one for each of
    ``posthoc_widths``.

    :param model: on its device; or anywhere, if it is shared among processes.
    :param optimization: the precision, and how averages warm up.
    :param parallel: how the model is spread over processes.
    :param use_fp16: whether the model computes in float16 and has float32 master weights.
    :param lr: learning rate of AdamW.
    :param weight_decay: AdamW's.
    :param ema_rate: the rates of the averages.
    :param posthoc_widths: relative widths of power-function averages.
    """

    def __init__(
        self,
        model: nn.Module,
        optimization: OptimizationOptions,
        parallel: ParallelOptions,
        use_fp16: bool,
        lr: float,
        weight_decay: float,
        ema_rate: list[float],
        posthoc_widths: list[float],
    ) -> None:
        self.model = model
        self.optimization = optimization
        self.parallel = parallel
        self.use_fp16 = use_fp16
        self.ema_rate = ema_rate
        self.posthoc_widths = posthoc_widths

        dist_util.sync_params(model.parameters())
        if parallel.sharded:
            shard(model, parallel, self._dtype)
        self.model_params = list(model.parameters())
        self.master_params = self.model_params
        if use_fp16:
            self.master_params = make_master_params(self.model_params)
            model.convert_to_fp16()  # type: ignore[operator]
        self.opt = make_optimizer(self.master_params, lr, weight_decay)
        self.ema_params = [copy.deepcopy(self.master_params) for _ in ema_rate]
        self.posthoc_params = [copy.deepcopy(self.master_params) for _ in posthoc_widths]

    @property
    def _dtype(self) -> torch.dtype | None:
        """What autocast computes in; None for the type of the weights."""
        return None if self.use_fp16 else PRECISIONS[self.optimization.precision or "fp32"]

    def _gradients(self) -> list[Tensor]:
        return [param.grad for param in self.master_params if param.grad is not None]

    def _update_averages(self, step: int, updates: int) -> None:
        """Move the averages towards the weights.

        :param step: counted from 0.
        :param updates: of the weights so far, with the last.
        """
        weights = local(self.master_params)
        for rate, params in zip(self.ema_rate, self.ema_params, strict=True):
            rate = self.optimization.ema_rate(rate, step)
            update_ema(local(params), weights, rate=rate)
        for width, params in zip(self.posthoc_widths, self.posthoc_params, strict=True):
            update_ema(local(params), weights, rate=power_rate(updates, gamma_of(width)))

    def _weights_finite(self) -> bool:
        """Whether weights and averages are; of a shared model, all shares of them."""
        averages = [*self.ema_params, *self.posthoc_params]
        weights = [param for params in (self.master_params, *averages) for param in params]
        finite = all_finite(local(weights))
        return not dist_util.any_rank(not finite)[0] if self.parallel.sharded else finite

    def _unflattened(self, master_params: list[nn.Parameter]) -> list[Tensor]:
        if self.use_fp16:
            return unflatten_master_params(self.model_params, master_params)
        return [param.detach() for param in master_params]

    def state_dict_of(self, master_params: list[nn.Parameter]) -> dict[str, Tensor]:
        """The model's state dict with other values for its parameters, as float32."""
        state = self.model.state_dict()
        names = [name for name, _ in self.model.named_parameters()]
        state.update(zip(names, self._unflattened(master_params), strict=True))
        return state

    @torch.no_grad()
    def fill_from(self, state: dict[str, Tensor], master_params: list[nn.Parameter]) -> None:
        """Overwrite parameters, in place, by those of a state dict."""
        names = [name for name, _ in self.model.named_parameters()]
        for name, param in zip(names, self._unflattened(master_params), strict=True):
            param.copy_(like(param, state[name]))

    @contextlib.contextmanager
    def averaged_model(self) -> Iterator[nn.Module]:
        """The model with the first EMA's weights, inside a ``with`` block."""
        trained = [param.detach().clone() for param in self.model_params]
        self._fill_model(self._unflattened(self.ema_params[0]))
        try:
            yield self.model
        finally:
            self._fill_model(trained)

    @torch.no_grad()
    def _fill_model(self, values: Sequence[Tensor]) -> None:
        for param, value in zip(self.model_params, values, strict=True):
            param.copy_(value)
