"""Compiled networks: the same numbers from one graph, few compilations, and errors in a line.

The backends "eager" and "aot_eager" trace as the real one does, and need no compiler.
"""

import copy
import re

import pytest
import torch
from launchers import TESTS, start
from script_runner import TINY, error_of, names, succeed
from torch._dynamo.testing import CompileCounterWithBackend
from toy import batches, make_diffusion, make_model

from improved_diffusion import dist_util, logger, runs
from improved_diffusion.compiling import (
    CompileOptions,
    check_compiler,
    compile_if_asked,
    compile_network,
    not_compiled,
)
from improved_diffusion.errors import UserError
from improved_diffusion.flags import make_parser
from improved_diffusion.optimization import OptimizationOptions
from improved_diffusion.same_job import deciding_flags
from improved_diffusion.script_util import ModelAndDiffusionOptions
from improved_diffusion.train_util import TrainLoop
from improved_diffusion.unet import EncoderUNetModel, SuperResModel
from improved_diffusion.validation import Validation
from improved_diffusion.watching import ValidationWatcher

COMPILE = {"compile": True}
WORKER = TESTS / "workers" / "compile_worker.py"


@pytest.fixture(autouse=True)
def _nothing_compiled_before():
    torch._dynamo.reset()


@pytest.fixture
def counter():
    return CompileCounterWithBackend("eager")


def is_compiled(model):
    return model._compiled_call_impl is not None


def arguments(count, classes=None, low_res=False):
    """What a network is called with."""
    more = {"y": torch.arange(count) % classes} if classes else {}
    more |= {"low_res": torch.randn(count, 1, 4, 4)} if low_res else {}
    return (torch.randn(count, 1, 8, 8), torch.arange(count)), more


def super_res(**kind):
    size = {"num_res_blocks": 1, "attention_resolutions": (2,), "channel_mult": (1, 2)}
    return SuperResModel(in_channels=1, model_channels=32, out_channels=1, **size, **kind)


def classifier(pool):
    size = {"num_res_blocks": 1, "attention_resolutions": (2,), "channel_mult": (1, 2)}
    kind = {"pool": pool, "num_head_channels": 32}
    return EncoderUNetModel(8, 1, 32, out_channels=10, **size, **kind)


KINDS = {
    "classes, checkpoint, dropout": (
        make_model,
        {"num_classes": 5, "null_class": True, "use_checkpoint": True, "dropout": 0.3},
        {"classes": 5},
    ),
    "super-resolution, other attention": (
        super_res,
        {"num_head_channels": 16, "use_new_attention_order": True, "resblock_updown": True},
        {"low_res": True},
    ),
    "classifier": (classifier, {"pool": "spatial_v2"}, {}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_one_graph_for_the_first_batch_and_one_for_all_others(kind, counter):
    make, network, call = KINDS[kind]
    model = make(**network)
    compiled = compile_network(copy.deepcopy(model), backend=counter, fullgraph=True)
    for count in (4, 3, 2):
        args, kwargs = arguments(count, **call)
        torch.manual_seed(1)
        expected = model(*args, **kwargs)
        torch.manual_seed(1)
        assert torch.equal(compiled(*args, **kwargs), expected)
    assert counter.frame_count == 2
    assert list(compiled.state_dict()) == list(model.state_dict())


def test_half_precision_is_one_graph(counter):
    model, args = make_model(), arguments(3)[0]
    model.convert_to_fp16()
    compiled = compile_network(copy.deepcopy(model), backend=counter, fullgraph=True)
    assert torch.equal(compiled(*args), model(*args))
    assert counter.frame_count == 1


def test_the_gradient_that_leads_samples(counter):
    model = classifier("attention").requires_grad_(False).eval()
    compiled = compile_network(copy.deepcopy(model), backend=counter, fullgraph=True)
    found = []
    for network in (model, compiled):
        torch.manual_seed(0)
        x, t = arguments(3)[0]
        with torch.no_grad(), torch.enable_grad():
            x.requires_grad_()
            found.append(torch.autograd.grad(network(x, t).square().sum(), x)[0])
    assert torch.equal(*found)


def test_a_copy_is_not_compiled():
    model = compile_network(torch.nn.Linear(2, 2), backend="eager")
    assert is_compiled(model)
    assert not is_compiled(copy.deepcopy(model))


def test_without_the_flag_nothing_is_compiled():
    models = [torch.nn.Linear(2, 2) for _ in range(3)]
    compile_if_asked(CompileOptions(), models[0])
    compile_if_asked(CompileOptions(compile=True), models[1], None, models[2])
    assert [is_compiled(model) for model in models] == [False, True, True]


@pytest.mark.filterwarnings("ignore")  # of the graphs that an error leaves
def test_what_a_network_refuses_it_refuses_compiled():
    model = compile_network(make_model(), backend="eager")
    with pytest.raises(UserError, match="cannot be halved"):
        model(torch.zeros(2, 1, 7, 7), torch.arange(2))


class Twice(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 2)

    def forward(self, x):
        return self.layer(x) * 2


def test_hooks_are_called_where_compiling_is_off(counter):
    model = compile_network(Twice(), backend=counter, fullgraph=True)
    x, seen = torch.ones(3, 2), []
    model(x)
    model.layer.register_forward_hook(lambda *_: seen.append("hook"))
    with not_compiled():
        model(x)
    assert seen == ["hook"]
    assert counter.frame_count == 1


# -- training -------------------------------------------------------------------------------------


def make_loop(model, **changes):
    def images():
        generator = torch.Generator().manual_seed(5)
        for first, size in ((0, 3), (3, 2)):
            x = torch.rand(size, 1, 8, 8, generator=generator) - 0.5
            yield x, {}, list(range(first, first + size))

    diffusion = make_diffusion()
    return TrainLoop(
        model=model,
        diffusion=diffusion,
        data=batches(),
        batch_size=4,
        microbatch=3,
        lr=1e-2,
        ema_rate="0.5",
        log_interval=1,
        save_interval=100,
        resume_checkpoint="",
        seed=3,
        watchers=[ValidationWatcher(Validation(diffusion, images, 5), 2)],
        **changes,
    )


@pytest.fixture
def train(tmp_path):
    """Train for some steps; the weights and averages, and what the loop looked at."""

    def run(name, model, steps=5, **changes):
        seen = {}
        with logger.scoped_configure(str(tmp_path / name), format_strs=["log"]):
            loop = make_loop(model, **changes)
            for step in range(steps):
                loop.run_step(*next(loop.data))
                if step % 2:
                    loop.watchers[0](loop)
                    seen[step] = dict(logger.getkvs())
                loop.step += 1
        weights = [*loop.master_params, *loop.ema_params[0]]
        return [param.detach() for param in weights], seen

    return run


@pytest.mark.slow
def test_training_and_validation_of_changing_weights(train, counter):
    options = {"optimization": OptimizationOptions(precision="bf16")}
    weights, seen = train("plain", make_model(dropout=0.2), **options)
    model = compile_network(make_model(dropout=0.2), backend=counter, fullgraph=True)
    compiled_weights, compiled_seen = train("compiled", model, **options)
    assert all(map(torch.equal, compiled_weights, weights))
    keys = {"val_loss", "val_ema_loss", "val_ema_bpd"}
    for step, values in seen.items():
        assert keys <= values.keys()
        assert {key: compiled_seen[step][key] for key in keys} == {key: values[key] for key in keys}
    assert values["val_loss"] != values["val_ema_loss"]
    # training: 3 images, then 1; validation: 3 or 2; of the bound other types of timesteps
    assert counter.frame_count <= 5


@pytest.mark.slow
def test_gradients_of_several_processes():
    done = succeed(start("torchrun", WORKER))
    errors = re.findall(r"relative error (\S+)", done.stdout)
    assert len(errors) == 2
    assert max(map(float, errors)) < 1e-5


# -- flags ----------------------------------------------------------------------------------------


def test_a_run_that_was_compiled_does_not_compile_its_sampling():
    flags = vars(make_parser("", CompileOptions, ModelAndDiffusionOptions).parse_args([]))
    stored = {**flags, **COMPILE, "image_size": 8}
    merged = runs.inherit(flags, set(), "run", stored)
    assert (merged["image_size"], merged["compile"]) == (8, False)
    assert runs.inherit({**flags, **COMPILE}, {"compile"}, "run", flags)["compile"] is True


def test_a_job_goes_on_compiled_or_not():
    assert deciding_flags({"compile": True, "seed": 1}) == {"seed": 1}


def test_sharded_training_is_refused():
    check_compiler(CompileOptions(), "fsdp")
    with pytest.raises(UserError, match="--compile True does not work with --parallel fsdp"):
        check_compiler(CompileOptions(compile=True), "fsdp")


def test_a_process_that_cannot_compile_ends_all(monkeypatch):
    monkeypatch.setattr(dist_util, "gather_objects", lambda reason: ["", "no g++ here"])
    with pytest.raises(UserError, match=r"process 1 could not compile \(no g\+\+ here\)"):
        check_compiler(CompileOptions(compile=True))


NO_COMPILER = {"CXX": "/nonexistent"}


def test_training_without_a_compiler(run_script, digits_dir, tmp_path):
    flags = {**TINY, "data_dir": digits_dir, "log_dir": "run", "train_steps": 2, **COMPILE}
    done = run_script("image_train", flags, cwd=tmp_path, env=NO_COMPILER)
    assert "needs a C++ compiler such as g++" in error_of(done)
    assert names(tmp_path) == []


def test_sampling_without_a_compiler(run_script, trained, tmp_path):
    flags = {"model_path": trained.path, "num_samples": 2, "log_dir": "out", **COMPILE}
    done = run_script("image_sample", flags, cwd=tmp_path, env=NO_COMPILER)
    assert "or leave the flag out" in error_of(done)
    assert names(tmp_path) == []
